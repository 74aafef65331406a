// All databases of the server, and those that were deleted and can be taken back.

import { question } from '../dialog.js';
import { el } from '../dom.js';
import { bytes, number, plural } from '../format.js';
import { button, chip, databaseLink, link, pages, searchField, section, table, when } from '../parts.js';
import { refine } from '../router.js';

const PAGE = 100;
const ORDERS = {
  name: (a, b) => a.name.localeCompare(b.name),
  devices: (a, b) => b.devices - a.devices,
  entities: (a, b) => (b.entities ?? 0) - (a.entities ?? 0),
  bytes: (a, b) => b.bytes - a.bytes,
  used: (a, b) => (b.used_ms ?? 0) - (a.used_ms ?? 0),
};

export const databases = {
  title: () => 'Databases',
  every: 5000,
  async load(asked, get) {
    const rows = await get(['databases']);
    // A server in memory keeps nothing that was deleted.
    const deleted = await get(['deleted']).catch((error) => {
      if (error.code === 'not_on_disk') return [];
      throw error;
    });
    return { rows, deleted };
  },
  draw({ rows, deleted }, asked, act) {
    const search = (asked.query.search ?? '').toLowerCase();
    const sorted = asked.query.sort in ORDERS ? asked.query.sort : 'name';
    const shown = rows.filter((row) => row.name.toLowerCase().includes(search)).sort(ORDERS[sorted]);
    const offset = Number(asked.query.offset) || 0;
    return [
      el('div', { class: 'tools' },
        searchField({ label: 'Search', value: asked.query.search ?? '', change: (text) => refine({ search: text, offset: '' }) }),
        button('New database', () => make(act), 'main')),
      el('p', { class: 'note' }, search ? `${number(shown.length)} of ${plural(rows.length, 'database')}` : plural(rows.length, 'database')),
      table({
        label: 'Databases', rows: shown.slice(offset, offset + PAGE), key: (row) => row.name, sorted,
        sortLink: (sort) => link(['databases'], { ...asked.query, sort, offset: '' }),
        empty: rows.length ? 'No database has such a name.' : 'There is no database yet: a device makes one when it first comes.',
        columns: [
          { name: 'Name', sort: 'name', up: true, show: (row) => databaseLink(row.name) },
          { name: 'State', show: state },
          { name: 'Devices', sort: 'devices', kind: 'number', show: (row) => number(row.devices) },
          { name: 'Entities', sort: 'entities', kind: 'number', show: (row) => number(row.entities) },
          { name: 'Size', sort: 'bytes', kind: 'number', show: (row) => bytes(row.bytes) },
          { name: 'Head', kind: 'number', show: (row) => number(row.head) },
          { name: 'Last used', sort: 'used', show: (row) => when(row.used_ms) },
        ],
      }),
      pages(['databases'], asked.query, shown.length, PAGE),
      deleted.length ? section('Deleted', table({
        label: 'Deleted databases', rows: deleted, key: (row) => row.id, empty: '',
        columns: [
          { name: 'Name', show: (row) => row.name },
          { name: 'Deleted', show: (row) => when(row.deleted_ms) },
          { name: '', show: (row) => button('Take back', () => act.change('POST', ['deleted', row.id, 'undelete'], {}, `${row.name} is back.`)) },
        ],
      })) : null,
    ];
  },
};

export function state(row) {
  if (row.frozen) return chip('frozen', 'conflict');
  return row.open ? chip('open', 'pushed') : chip('closed');
}

async function make(act) {
  const given = await question({
    title: 'New database', text: 'Letters, digits, dots, underscores and dashes.', action: 'Make it',
    fields: [{ name: 'name', label: 'Name' }],
  });
  if (given) await act.change('POST', ['databases'], { name: given.name }, `${given.name} is made.`);
}
