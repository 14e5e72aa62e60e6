"use strict";

// Take back one of the annotator's own labels; its item is then asked again.

for (const button of document.querySelectorAll("[data-undo]")) {
  button.addEventListener("click", async () => {
    button.disabled = true;
    const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const answer = await fetch("/api/undo", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ key, judgement: Number(button.dataset.undo) }),
    });
    if (answer.ok) location.assign("/");
    else document.getElementById("problem").textContent = await answer.text();
  });
}
