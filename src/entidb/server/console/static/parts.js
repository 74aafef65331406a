// Parts that several views are made of: tables, figures, chips, empty states, links.

import { el } from './dom.js';
import { ago, moment, number } from './format.js';

// `columns`: [{ name, show, kind, sort }]; with `sort`, the head is a link that sorts by it.
export function table({ label, columns, rows, key, empty, sorted, sortLink }) {
  if (!rows.length) return el('p', { class: 'empty' }, empty);
  return el('div', { class: 'scroll', role: 'region', 'aria-label': label, tabindex: 0 },
    el('table', { role: 'table', 'aria-label': label },
      el('thead', { role: 'rowgroup' }, el('tr', { role: 'row' }, columns.map((column) => head(column, sorted, sortLink)))),
      el('tbody', { role: 'rowgroup' }, rows.map((row) => el('tr', { role: 'row', 'data-key': key ? key(row) : null },
        columns.map((column) => el('td', {
          role: 'cell', 'data-label': column.name, class: column.kind ?? null,
        }, el('span', { class: 'cell' }, column.show(row)))))))));
}

function head(column, sorted, sortLink) {
  const by = column.sort && column.sort === sorted;
  const inside = column.sort && sortLink
    ? el('a', { href: sortLink(column.sort) }, column.name, by ? ' ↓' : '')
    : column.name;
  return el('th', {
    role: 'columnheader', scope: 'col', class: column.kind ?? null,
    'aria-sort': by ? (column.up ? 'ascending' : 'descending') : null,
  }, inside);
}

export function figures(list) {
  return el('dl', { class: 'figures' }, list.filter(Boolean).map(([name, value, note]) => el('div', {},
    el('dt', {}, name), el('dd', {}, value), note ? el('dd', { class: 'note' }, note) : null)));
}

export function chip(text, kind = '') {
  return el('span', { class: `chip ${kind}` }, text);
}

export function when(ms) {
  return ms ? el('time', { datetime: new Date(ms).toISOString(), title: moment(ms) }, ago(ms)) : '–';
}

// An address inside the page; parts may be any text.
export function link(parts, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== '' && value !== null && value !== undefined);
  const tail = given.length ? `?${new URLSearchParams(given)}` : '';
  return `#/${parts.map(encodeURIComponent).join('/')}${tail}`;
}

export function deviceLink(database, device) {
  return el('a', { href: link(['device', database, device.device_id]) },
    device.subject ? `${device.subject} ` : '', el('code', {}, device.device_id.slice(0, 8)));
}

export function databaseLink(name) {
  return el('a', { href: link(['database', name]) }, name);
}

export function button(text, onclick, kind = '') {
  return el('button', { type: 'button', class: kind, onclick }, text);
}

export function section(title, ...children) {
  return el('section', {}, el('h2', {}, title), children);
}

// A field that filters: what is typed goes into the address after a moment.
export function searchField({ label, value, change }) {
  let timer = 0;
  return el('label', { class: 'field' }, el('span', {}, label), el('input', {
    type: 'search', value, autocomplete: 'off', spellcheck: 'false',
    oninput: (event) => {
      clearTimeout(timer);
      const text = event.target.value;
      timer = setTimeout(() => change(text), 250);
    },
  }));
}

export function selectField({ label, value, options, change }) {
  return el('label', { class: 'field' }, el('span', {}, label), el('select', {
    onchange: (event) => change(event.target.value),
  }, options.map(([each, text]) => el('option', { value: each, selected: each === value }, text))));
}

// Links to the rows before and after those that are shown; null where one page has them all.
export function pages(view, query, total, size) {
  const offset = Number(query.offset) || 0;
  if (total <= size) return null;
  const to = (at) => link(view, { ...query, offset: at || '' });
  return el('nav', { class: 'tools', 'aria-label': 'Pages' },
    offset > 0 ? el('a', { class: 'button', href: to(Math.max(0, offset - size)) }, '← Before') : null,
    el('span', { class: 'note' }, `${number(offset + 1)} to ${number(Math.min(total, offset + size))} of ${number(total)}`),
    offset + size < total ? el('a', { class: 'button', href: to(offset + size) }, 'After →') : null);
}
