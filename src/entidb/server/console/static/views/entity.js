// One entity, and two versions of it compared: those that this page has seen, and those that
// devices wanted to write and the server refused.

import { el } from '../dom.js';
import { bytes, moment, number } from '../format.js';
import { compare } from '../json.js';
import { figures, link, section, selectField, table, when } from '../parts.js';
import { refine } from '../router.js';

const SEEN_MAX = 20;
// Versions that were looked at, by entity, as long as the page is open.
const seen = new Map();

export const entity = {
  title: ({ parts }) => `${parts[1] ?? 'Entity'} ${(parts[2] ?? '').slice(0, 8)}`,
  every: 3000,
  async load({ parts: [database, collection, id] }, get) {
    const [row, happened] = await Promise.all([
      get(['databases', database ?? '', 'entities', id ?? ''], { collection }).catch((error) => {
        if (error.code === 'not_found') return null;
        throw error;
      }),
      get(['happened'], { database, what: 'conflict,rejected', limit: 1000 }),
    ]);
    return { row, versions: versions(`${database}/${collection}/${id}`, row, collection, id, happened) };
  },
  draw({ row, versions: found }, { parts: [database, collection], query }) {
    const back = el('p', {}, el('a', { href: link(['entities'], { database, collection }) }, `All of ${collection}`), ` in ${database}`);
    return [
      back,
      row ? details(database, row) : el('p', { class: 'empty' }, 'There is no such entity: it was deleted, or never here.'),
      found.length > 1 ? comparison(found, query) : el('p', { class: 'note' },
        'There is one version to see. A newer one, as long as this page is open, or one that a device wanted and the server refused, can be compared with it.'),
    ];
  },
};

function versions(name, row, collection, id, happened) {
  const kept = seen.get(name) ?? [];
  if (row && !kept.some((each) => each.key === `v${row.version}`)) {
    kept.push({ key: `v${row.version}`, words: `version ${number(row.version)}, on the server`, value: row.value });
    if (kept.length > SEEN_MAX) kept.shift();
  }
  seen.set(name, kept);
  const refused = happened.flatMap((each) => (each.touched ?? [])
    .filter((one) => one.collection === collection && one.id === id && one.kept !== false)
    .map((one) => ({
      key: `r${each.number}`, value: one.deleted ? undefined : one.value,
      words: `${each.what} of ${each.subject || each.device_id.slice(0, 8)}, ${moment(each.at_ms)}`,
    })));
  return [...kept.toReversed(), ...refused];
}

function details(database, row) {
  return [
    figures([
      ['Version', number(row.version), 'commit of the server'], ['Changed', when(row.changed_ms), moment(row.changed_ms)], ['Size', bytes(row.bytes)],
      ['By device', el('a', { href: link(['device', database, row.device_id]) }, row.device_id.slice(0, 8))],
    ]),
    el('p', {}, el('code', {}, row.id)),
    row.whole ? null : el('p', { class: 'warning' }, 'It is large: long parts are left out here.'),
    section('Value', el('pre', { tabindex: 0, 'aria-label': 'Value as JSON' }, JSON.stringify(row.value, null, 2))),
  ];
}

function comparison(found, query) {
  const wanted = query.compare ? `r${query.compare}` : query.right;
  const right = found.find((each) => each.key === wanted) ?? found[1];
  const left = found.find((each) => each.key === query.left && each !== right) ?? found.find((each) => each !== right);
  const options = found.map((each) => [each.key, each.words]);
  const rows = compare(left.value, right.value);
  return section('Compare two versions',
    el('div', { class: 'tools' },
      selectField({ label: 'One', value: left.key, options, change: (key) => refine({ left: key }) }),
      selectField({ label: 'The other', value: right.key, options, change: (key) => refine({ right: key, compare: '' }) })),
    el('p', { class: 'note' }, `${number(rows.filter((each) => each.changed).length)} of ${number(rows.length)} fields differ.`),
    table({
      label: 'Two versions, field by field', rows: [...rows].sort((a, b) => b.changed - a.changed), key: (each) => each.field, empty: 'Both are empty.',
      columns: [
        { name: 'Field', show: (each) => (each.changed ? el('b', {}, each.field) : each.field) },
        { name: 'One', show: (each) => each.left ?? 'not there' },
        { name: 'The other', show: (each) => each.right ?? 'not there' },
        { name: '', show: (each) => (each.changed ? '≠' : '=') },
      ],
    }));
}
