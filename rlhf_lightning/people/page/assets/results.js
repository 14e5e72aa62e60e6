"use strict";

for (const button of document.querySelectorAll("[data-copies]")) {
  button.addEventListener("click", async () => {
    const shown = document.getElementById(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(shown.textContent.trim());
      button.textContent = "Copied";
    } catch {  // the clipboard needs HTTPS or this machine: select the text instead
      window.getSelection().selectAllChildren(shown);
    }
  });
}
