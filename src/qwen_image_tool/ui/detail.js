// One picture, or several beside each other: forms, the slider, keys.
// A form with data-form is a button with what was typed; data-at-once: as soon as it is chosen.
const send = form => trigger('click',
  {do: form.dataset.form, ...form.dataset, ...Object.fromEntries(new FormData(form))});

element.addEventListener('submit', event => {
  event.preventDefault();
  if (event.target.dataset.save) save(event.target);
  else send(event.target);
});
element.addEventListener('change', event => {
  if (event.target.form?.hasAttribute('data-at-once')) send(event.target.form);
});
element.addEventListener('input', event => {
  if (event.target.type === 'range')
    event.target.parentElement.style.setProperty('--at', `${event.target.value}%`);
});

// The file is fetched first: where it can't be made, the page says so instead of leaving.
async function save(form) {
  const asked = new URLSearchParams(new FormData(form));
  const url = `${form.dataset.save}?${asked}&download=true`;
  const answer = await fetch(url).catch(() => null);
  if (!answer?.ok) {
    const said = await answer?.json().catch(() => null);
    trigger('click', {do: 'unsaved', said: JSON.stringify(said)});
    return;
  }
  const link = document.createElement('a');
  link.href = url;  // from the browser's cache
  link.download = '';
  link.click();
}

const typing = node => node?.closest('input, textarea, select');
const shown = () => element.offsetParent && element.querySelector('.qit-detail');
document.addEventListener('keydown', event => {
  if (!shown() || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key !== 'Escape' && typing(event.target)) return;
  const buttons = {ArrowLeft: '[data-key=newer]', ArrowRight: '[data-key=older]',
    Escape: '[data-do=back]', s: '[data-do=star]', Delete: '[data-do=delete]'};
  element.querySelector(buttons[event.key] ?? ':not(*)')?.click();
});

// The list keeps its place while a picture is looked at.
let open = false, at = 0, back = '';
addEventListener('scroll', () => { if (!open && document.querySelector('.qit-tiles')?.offsetParent) at = scrollY; }, {passive: true});
function turn() {
  const detail = element.querySelector('.qit-detail');
  if (detail) back = detail.dataset.picture || back;
  if (open === Boolean(detail)) return;
  open = Boolean(detail);
  if (open) {
    scrollTo({top: Math.min(scrollY, element.getBoundingClientRect().top + scrollY - 80), behavior: 'instant'});
    detail.querySelector('[data-do=back]').focus({focusVisible: false, preventScroll: true});
  } else {
    scrollTo({top: at, behavior: 'instant'});
    requestAnimationFrame(() => document.querySelector(
      `.qit-tiles [data-key="show-${CSS.escape(back)}"]`)?.focus({preventScroll: true}));
  }
}
watch('value', turn);
turn();
