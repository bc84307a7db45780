// What Gradio does not do: keys, the page's language, and what is said when the server is gone.
// window.qit holds the words, see page.py.
(() => {
  const said = window.qit;
  document.documentElement.lang = said.language;

  // Language and colours are the browser's own choice. "" leaves them to the browser and the system.
  const cookie = () => document.cookie.match(/qit_language=(\w*)/)?.[1] ?? '';
  const dark = matchMedia('(prefers-color-scheme: dark)');
  said.chosen = what => what === 'theme' ? localStorage.getItem('qit_theme') ?? '' : cookie();
  said.choose = (what, value) => {
    if (what === 'theme') {
      localStorage.setItem('qit_theme', value);
      colour();
    } else if (value !== cookie()) {
      document.cookie = `qit_language=${value}; path=/; max-age=31536000; samesite=strict`;
      location.reload();
    }
  };
  function colour() {
    const wanted = said.chosen('theme') ? said.chosen('theme') === 'dark' : dark.matches;
    if (document.body.classList.contains('dark') !== wanted)
      document.body.classList.toggle('dark', wanted);
  }
  const ready = work => document.readyState === 'loading'
    ? addEventListener('DOMContentLoaded', work) : work();
  ready(() => {
    new MutationObserver(colour).observe(document.body, {attributeFilter: ['class']});
    colour();
  });

  // A picture that forms below the window, as on a phone, is brought into it.
  document.addEventListener('click', event => {
    const stage = document.getElementById('qit-stage');
    if (event.target.closest('#qit-generate, [data-do=first]') && stage
        && stage.getBoundingClientRect().top > innerHeight * .6)
      setTimeout(() => stage.scrollIntoView({block: 'start'}), 300);
  });

  // Ctrl+Enter generates, Esc cancels: from anywhere on the page, but not out of an open list.
  const press = id => {
    const button = document.getElementById(id);
    if (button && !button.disabled && button.offsetParent) button.click();
  };
  const open = list => list?.getAttribute('aria-expanded') === 'true';
  document.addEventListener('keydown', event => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      document.activeElement?.dispatchEvent(new Event('change', {bubbles: true}));
      press('qit-generate');
    } else if (event.key === 'Escape' && !open(document.activeElement)) {
      press('qit-cancel');
    }
  }, true);

  // Gradio opens a list at every key, also at the one that leaves it: it would stay open.
  document.addEventListener('keydown', event => {
    if (event.key === 'Tab' && event.target.role === 'combobox') event.stopPropagation();
  }, true);

  // What becomes of the job on the stage is read out, and told where the page is not looked at.
  const heard = document.createElement('div');
  heard.className = 'qit-heard';
  heard.setAttribute('aria-live', 'polite');
  let job = '', state = '', wanted = '';
  function follow() {
    const asked = document.querySelector('[data-wanted]');  // what another tab leads to
    if (asked?.offsetParent && asked.dataset.wanted !== wanted) {
      wanted = asked.dataset.wanted;
      asked.scrollIntoView({block: 'center'});
      asked.focus();
    }
    const stage = document.querySelector('#qit-stage [data-job]');
    if (!stage || (stage.dataset.job === job && stage.dataset.state === state)) return;
    const watched = stage.dataset.job === job && state === 'running';
    ({job, state} = stage.dataset);
    heard.textContent = stage.dataset.said;
    if (watched && document.hidden && state !== 'queued' && window.Notification?.permission === 'granted')
      new Notification('QwenImageTool', {body: stage.dataset.said, icon: 'favicon.ico', tag: job});
  }
  const settled = () => document.body.classList.toggle(
    'qit-notified', !window.Notification || Notification.permission !== 'default');
  document.addEventListener('click', event => {
    if (event.target.closest('[data-do=notify]')) Notification.requestPermission().then(settled);
  });
  new MutationObserver(follow).observe(document.documentElement, {childList: true, subtree: true});
  ready(() => {
    document.body.append(heard);
    settled();
  });

  // What went wrong is said until something else is pressed.
  document.addEventListener('click', event => {
    if (event.target.closest('button')) document.querySelector('.qit-toast')?.remove();
  }, true);

  // A picture that is dropped anywhere is read; one that is dragged out of the page is not.
  const drop = document.createElement('div');
  drop.className = 'qit-drop';
  drop.textContent = said.drop;
  let own = false;
  const carries = event => !own && event.dataTransfer?.types.includes('Files')
    && !event.target.closest?.('[data-testid=file-upload], .upload-container');
  addEventListener('dragstart', () => { own = true; });
  addEventListener('dragend', () => { own = false; });
  addEventListener('dragover', event => {
    if (!carries(event)) return;
    event.preventDefault();
    document.body.append(drop);
  });
  addEventListener('dragleave', event => { if (!event.relatedTarget) drop.remove(); });
  addEventListener('drop', event => {
    drop.remove();
    const input = document.querySelector('#qit-top input[type=file]');
    if (!carries(event) || !input || !event.dataTransfer.files.length) return;
    event.preventDefault();
    const one = new DataTransfer();
    one.items.add(event.dataTransfer.files[0]);
    input.files = one.files;
    input.dispatchEvent(new Event('change', {bubbles: true}));
  });

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
