// Elements from data, as text: nothing is ever read as markup. `morph` brings what is on the page
// to a newly made tree and leaves alone what has not changed, so that focus, scroll position and
// what a person is typing stay.

const SVG = 'http://www.w3.org/2000/svg';
const HANDLERS = ['onclick', 'oninput', 'onchange', 'onsubmit', 'onkeydown'];

export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) {
      if (!HANDLERS.includes(name)) throw new Error(`no handler is called ${name}`);
      node[name] = value;
    } else if (name === 'value' || name === 'checked' || name === 'selected') {
      node[name] = value;
    } else {
      node.setAttribute(name, value === true ? '' : String(value));
    }
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined
    && child !== false).map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

export function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName
      || key(old) !== key(fresh)) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  attributes(old, fresh);
  properties(old, fresh);
  children(old, fresh);
}

function key(node) {
  return node.nodeType === Node.ELEMENT_NODE ? node.getAttribute('data-key') : null;
}

function attributes(old, fresh) {
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(name === 'open')) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
}

function properties(old, fresh) {
  for (const name of HANDLERS) {
    if (old[name] !== fresh[name]) old[name] = fresh[name];
  }
  if (!('value' in old) || old === document.activeElement) return;
  if (old.nodeName === 'SELECT') return; // its options say it, after they are there
  if (old.value !== fresh.value) old.value = fresh.value;
}

function children(old, fresh) {
  const chosen = old.nodeName === 'SELECT' ? fresh.value : null;
  const wanted = [...fresh.childNodes];
  const there = [...old.childNodes];
  wanted.forEach((child, at) => {
    if (at < there.length) morph(there[at], child);
    else old.append(child);
  });
  there.slice(wanted.length).forEach((child) => child.remove());
  if (chosen !== null && old !== document.activeElement && old.value !== chosen) old.value = chosen;
}
