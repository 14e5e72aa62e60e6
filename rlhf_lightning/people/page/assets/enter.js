"use strict";

document.getElementById("enter").addEventListener("submit", async (event) => {
  event.preventDefault();
  const name = document.getElementById("name").value.trim();
  const answer = await fetch("/api/enter", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ name }),
  });
  if (answer.ok) location.assign("/");
  else document.getElementById("problem").textContent = await answer.text();
});
