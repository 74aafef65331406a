// Images of databases, with which devices begin: which there are, how old, how large.

import { el } from '../dom.js';
import { bytes, number, plural } from '../format.js';
import { chip, databaseLink, section, table, when } from '../parts.js';

export const images = {
  title: () => 'Images',
  every: 5000,
  load: (asked, get) => get(['images']),
  draw(rows) {
    const size = rows.reduce((sum, row) => sum + row.bytes, 0);
    return [
      el('p', { class: 'note' }, rows.length ? `${plural(rows.length, 'image')}, ${bytes(size)} in all` : ''),
      imageTable(rows, true),
    ];
  },
};

export function imageTable(rows, named) {
  return table({
    label: 'Images', rows, key: (row) => `${row.database}/${row.id}`,
    empty: 'There is no image. The server makes one of a database that has segments_min_entities entities or more.',
    columns: [
      named ? { name: 'Database', show: (row) => databaseLink(row.database) } : null,
      { name: 'Made', show: (row) => when(row.made_ms) },
      { name: 'As of commit', kind: 'number', show: (row) => number(row.head) },
      { name: 'Behind', kind: 'number', show: (row) => (row.behind === undefined ? 'not known' : plural(row.behind, 'commit')) },
      { name: 'Entities', kind: 'number', show: (row) => number(row.entities) },
      { name: 'Segments', kind: 'number', show: (row) => number(row.segments) },
      { name: 'Size', kind: 'number', show: (row) => bytes(row.bytes) },
      { name: 'Packing', show: (row) => row.packing },
      { name: 'State', show: state },
    ].filter(Boolean),
  });
}

function state(row) {
  if (row.counts === undefined) return chip('database not open');
  if (!row.counts) return chip('not offered any more', 'conflict');
  return row.until_ms === undefined ? chip('offered', 'pushed') : chip('in use by devices', 'running');
}

export function imageSection(rows) {
  return section('Images', imageTable(rows, false));
}
