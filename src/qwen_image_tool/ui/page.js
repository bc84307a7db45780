// What Gradio does not do: keys, the page's language, and what is said when the server is gone.
// window.qit holds the words, see page.py.
(() => {
  const said = window.qit;
  document.documentElement.lang = said.language;

  // Ctrl+Enter generates, Esc cancels: from anywhere on the page, but not out of an open list.
  const press = id => {
    const button = document.getElementById(id);
    if (button && !button.disabled && button.offsetParent) button.click();
  };
  document.addEventListener('keydown', event => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      document.activeElement?.dispatchEvent(new Event('change', {bubbles: true}));
      press('qit-generate');
    } else if (event.key === 'Escape' && !document.querySelector('ul[role=listbox]')) {
      press('qit-cancel');
    }
  }, true);

  // A server that is gone is said once, and the page comes back with it.
  const banner = document.createElement('div');
  banner.className = 'qit-gone';
  banner.setAttribute('role', 'alert');
  let gone = false;
  async function look() {
    let here = false;
    try {
      here = (await fetch('/healthz', {cache: 'no-store'})).ok;
    } catch { /* not reached */ }
    if (here && gone) return location.reload();
    if (!here && !gone) {
      gone = true;
      banner.textContent = said.gone;
      document.body.append(banner);
      document.body.classList.add('qit-away');
    }
  }
  setInterval(look, 3000);
})();
