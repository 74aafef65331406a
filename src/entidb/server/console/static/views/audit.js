// The audit log: who changed or tried what, when, from where, and what came of it.

import { el } from '../dom.js';
import { plural } from '../format.js';
import { chip, databaseLink, searchField, table, when } from '../parts.js';
import { refine } from '../router.js';

const SHOWN = 200;

export const audit = {
  title: () => 'Audit log',
  every: 5000,
  async load(asked, get) {
    return get(['audit'], { limit: 1000 });
  },
  draw(rows, { query }) {
    const words = (query.search ?? '').toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) => {
      const text = JSON.stringify(row).toLowerCase();
      return words.every((word) => text.includes(word));
    });
    return [
      el('div', { class: 'tools' }, searchField({ label: 'Search the newest 1,000 entries', value: query.search ?? '', change: (search) => refine({ search }) })),
      el('p', { class: 'note' }, found.length > SHOWN ? `The newest ${SHOWN} of ${plural(found.length, 'entry', 'entries')}` : plural(found.length, 'entry', 'entries')),
      table({
        label: 'Audit log', rows: found.slice(0, SHOWN), empty: words.length ? 'No entry matches.' : 'Nothing was changed yet.',
        columns: [
          { name: 'When', show: (row) => when(row.time_ms) },
          { name: 'Who', show: (row) => row.who || 'nobody' },
          { name: 'From', show: (row) => row.where },
          { name: 'What', show: (row) => row.action },
          { name: 'Database', show: (row) => (row.database ? databaseLink(row.database) : '–') },
          { name: 'Result', show: (row) => chip(row.result ?? 'done', (row.result ?? 'done') === 'done' ? 'done' : 'failed') },
          { name: 'More', show: more },
        ],
      }),
    ];
  },
};

function more(row) {
  const parts = Object.entries(row.details ?? {}).filter(([, value]) => value).map(([name, value]) => `${name} ${value}`);
  if ((row.count ?? 1) > 1) parts.push(`${row.count} times`);
  return parts.join(', ');
}
