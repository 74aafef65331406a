// What the server did not take lately: conflicts, rejected transactions, refused requests.

import { el } from '../dom.js';
import { number, plural } from '../format.js';
import { chip, databaseLink, deviceLink, link, selectField, table, when } from '../parts.js';
import { refine } from '../router.js';

const ALL = 'conflict,rejected,refused';

export const conflicts = {
  title: () => 'Conflicts and rejections',
  every: 3000,
  async load({ query }, get) {
    return get(['happened'], { what: query.what ?? ALL, database: query.database, limit: 200 });
  },
  draw(rows, { query }) {
    return [
      el('p', { class: 'note' }, 'The newest ones since the server started. A device resolves its conflicts by itself, as its policies say.'),
      el('div', { class: 'tools' }, selectField({
        label: 'Show', value: query.what ?? ALL, change: (what) => refine({ what }),
        options: [[ALL, 'everything'], ['conflict', 'conflicts'], ['rejected', 'rejected transactions'], ['refused', 'refused requests'], ['pushed', 'accepted pushes']],
      })),
      el('p', { class: 'note' }, plural(rows.length, 'entry', 'entries')),
      table({
        label: 'Conflicts and rejections', rows, key: (each) => each.number, empty: 'Nothing of that kind happened.',
        columns: [
          { name: 'When', show: (each) => when(each.at_ms) },
          { name: 'What', show: (each) => chip(each.what, each.what) },
          { name: 'Device', show: (each) => deviceLink(each.database, each) },
          { name: 'Database', show: (each) => databaseLink(each.database) },
          { name: 'Why', show: why },
          { name: 'Entities', show: touchedList },
        ],
      }),
    ];
  },
};

function why(each) {
  if (each.what === 'pushed') return plural(each.count ?? 1, 'transaction');
  return [each.code, each.message].filter(Boolean).join(': ') || 'built on an older version';
}

// Entities that a refused transaction wanted to write; each leads to a comparison.
export function touchedList(each) {
  const touched = each.touched ?? [];
  if (!touched.length) return '–';
  return el('ul', { class: 'plain' }, touched.slice(0, 3).map((one) => el('li', {},
    el('a', { href: link(['entity', each.database, one.collection, one.id], { compare: each.number }) },
      `${one.collection} `, el('code', {}, one.id.slice(0, 8))), one.deleted ? ' (to delete)' : '')),
  touched.length + (each.more ?? 0) > 3 ? el('li', {}, `and ${number(touched.length + (each.more ?? 0) - 3)} more`) : null);
}
