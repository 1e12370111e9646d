/** Sets the colours before the first paint. A plain script: a module would run after it. */

(() => {
  const chosen = localStorage.getItem("llamita-theme"); // "light", "dark", or null: as the system is
  if (chosen) document.documentElement.dataset.theme = chosen;
})();
