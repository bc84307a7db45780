// The gallery's list. Tiles near the window are in the document; above and below is room.
// A place is a picture's number in the list; pages of tiles are asked of the server as HTML.
const PAGE = 60;
const list = document.createElement('ul');
list.className = 'qit-tiles';
element.after(list);
const tiles = new Map(), nodes = new Map(), picked = new Set();
let asked = new Set(), filter = null, count = 0, turn = 0, current = 0, columns = 1, row = 1;

function begin() {
  const frame = element.querySelector('.qit-album');
  if (!frame) return;
  if (frame.dataset.filter !== filter) {
    tiles.clear();
    current = 0;
  }
  filter = frame.dataset.filter;
  count = Number(frame.dataset.count);
  list.setAttribute('aria-label', frame.dataset.label);
  take(0, JSON.parse(frame.dataset.first));
  turn += 1;
  asked = new Set([0]);
  draw();
  show_picked();
}

const take = (start, page) => page.forEach((tile, number) => tiles.set(start + number, tile));

async function ask(page) {
  const mine = turn;
  asked.add(page);
  try {
    const found = await server.tiles(JSON.stringify({filter, start: page * PAGE}));
    if (mine === turn) take(page * PAGE, found);
  } catch {
    setTimeout(() => { asked.delete(page); draw(); }, 2000);
  }
  draw();
}

function measure() {
  const style = getComputedStyle(list);
  columns = style.gridTemplateColumns.split(' ').length;
  const gap = parseFloat(style.columnGap);
  row = (list.clientWidth + gap) / columns;
}

function draw() {
  if (!list.offsetParent) return;
  measure();
  const top = list.getBoundingClientRect().top, rows = Math.ceil(count / columns);
  const first = Math.min(rows, Math.max(0, Math.floor((-top - innerHeight) / row)));
  const last = Math.min(rows, Math.max(first, Math.ceil((2 * innerHeight - top) / row)));
  list.style.paddingTop = `${first * row}px`;
  list.style.paddingBottom = `${(rows - last) * row}px`;
  const from = first * columns, to = Math.min(count, last * columns);
  for (let page = Math.floor(from / PAGE); page * PAGE < to; page++)
    if (!asked.has(page)) ask(page);
  place(from, to);
}

// Nodes that are right stay as they are: their pictures are loaded and one may have the focus.
function place(from, to) {
  for (const [number, node] of nodes)
    if (number < from || number >= to) { node.remove(); nodes.delete(number); }
  let next = list.firstElementChild;
  for (let number = from; number < to; number++) {
    const html = tiles.get(number) ?? '<li class="blank"></li>';
    let node = nodes.get(number);
    if (node?.html !== html) {
      const made = make(number, html), key = node?.contains(document.activeElement) &&
        document.activeElement.dataset.key;
      if (node) node.replaceWith(made); else list.insertBefore(made, next);
      if (key) (made.querySelector(`[data-key="${key}"]`) ?? made.querySelector('.qit-tile'))?.focus();
      nodes.set(number, node = made);
    }
    next = node.nextElementSibling;
  }
  if (!nodes.has(current)) current = from;
  rove(current);
}

function make(number, html) {
  const holder = document.createElement('template');
  holder.innerHTML = html;
  const made = holder.content.firstElementChild;
  made.html = html;
  made.setAttribute('aria-setsize', count);
  made.setAttribute('aria-posinset', number + 1);
  mark(made);
  return made;
}

// Picking

function mark(tile) {
  const box = tile.querySelector('[data-pick]');
  if (!box) return;
  box.checked = picked.has(box.dataset.pick);
  tile.classList.toggle('picked', box.checked);
}

function pick(id, on) {
  if (on) picked.add(id); else picked.delete(id);
  list.querySelectorAll('li').forEach(mark);
  show_picked();
}

function show_picked() {
  const bar = element.querySelector('.qit-picked');
  if (!bar) return;
  bar.hidden = !picked.size;
  bar.querySelector('strong').textContent = bar.dataset.said.replace('%s', picked.size);
  for (const button of bar.querySelectorAll('[data-do]')) {
    button.dataset.pictures = [...picked].join(',');
    button.hidden = (button.classList.contains('two') && picked.size !== 2)
      || (button.classList.contains('several') && picked.size < 2);
  }
}

function pick_none() {
  picked.clear();
  list.querySelectorAll('li').forEach(mark);
  show_picked();
}

element.addEventListener('click', event => {
  if (event.target.closest('[data-none], [data-do=delete]')) setTimeout(pick_none);
});
list.addEventListener('change', event => pick(event.target.dataset.pick, event.target.checked));
list.addEventListener('click', event => {
  const button = event.target.closest('[data-do]');
  if (button) trigger('click', {...button.dataset});
});

// Keys: one tile can be reached by Tab, the arrows go on from there

function rove(number) {
  nodes.get(current)?.querySelector('.qit-tile')?.setAttribute('tabindex', '-1');
  current = number;
  nodes.get(current)?.querySelector('.qit-tile')?.setAttribute('tabindex', '0');
}

function go(number) {
  const wanted = Math.max(0, Math.min(count - 1, number));
  const top = list.getBoundingClientRect().top + Math.floor(wanted / columns) * row;
  if (!nodes.get(wanted)?.querySelector('.qit-tile')) {
    scrollBy({top: top - innerHeight / 3, behavior: 'instant'});
    draw();
  }
  rove(wanted);
  nodes.get(wanted)?.querySelector('.qit-tile')?.focus();
}

list.addEventListener('focusin', event => {
  for (const [number, node] of nodes) if (node.contains(event.target)) return rove(number);
});
list.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
    PageUp: -4 * columns, PageDown: 4 * columns, Home: -count, End: count};
  const picture = nodes.get(current)?.dataset.picture, key = event.key.toLowerCase();
  if (event.key in steps) go(current + steps[event.key]);
  else if (key === 'x' && picture) pick(picture, !picked.has(picture));
  else if (key === 's' && picture) trigger('click', {do: 'star', picture});
  else if (key === 'delete' && picture) trigger('click', {do: 'delete', pictures: picture});
  else return;
  event.preventDefault();
});

let waiting = false;
function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}
addEventListener('scroll', soon, {passive: true});
addEventListener('resize', soon);
new ResizeObserver(soon).observe(list);
watch('value', begin);
begin();
