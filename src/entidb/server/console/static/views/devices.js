// Devices of all databases, found by what one knows of them.

import { el } from '../dom.js';
import { number, plural } from '../format.js';
import { chip, databaseLink, deviceLink, link, pages, searchField, table, when } from '../parts.js';
import { refine } from '../router.js';

const PAGE = 50;

export const devices = {
  title: () => 'Devices',
  every: 3000,
  async load({ query }, get) {
    return get(['devices'], {
      search: query.search, database: query.database, sort: query.sort ?? 'behind',
      offset: Number(query.offset) || 0, limit: PAGE,
    });
  },
  draw({ total, rows }, { query }) {
    const sorted = query.sort ?? 'behind';
    return [
      el('div', { class: 'tools' },
        searchField({ label: 'Search by name, id, program or error', value: query.search ?? '', change: (search) => refine({ search, offset: '' }) }),
        query.database ? el('a', { class: 'button', href: link(['devices'], { ...query, database: '', offset: '' }) }, `Only ${query.database} ✕`) : null),
      el('p', { class: 'note' }, plural(total, 'device')),
      table({
        label: 'Devices', rows, key: (each) => `${each.database}/${each.row.device.device_id}`, sorted,
        sortLink: (sort) => link(['devices'], { ...query, sort, offset: '' }),
        empty: query.search || query.database ? 'No device matches.' : 'No device has come yet.',
        columns: [
          { name: 'Device', sort: 'name', up: true, show: ({ database, row }) => deviceLink(database, row.device) },
          { name: 'Database', show: ({ database }) => databaseLink(database) },
          { name: 'Behind', sort: 'behind', kind: 'number', show: ({ row }) => number(row.behind) },
          { name: 'Last seen', sort: 'seen', show: ({ row }) => when(row.device.last_ms) },
          { name: 'Program', show: ({ row }) => row.device.client ?? '–' },
          { name: 'Conflicts', sort: 'conflicts', kind: 'number', show: ({ row }) => number(row.device.conflicts ?? 0) },
          { name: 'Rejected', sort: 'rejected', kind: 'number', show: ({ row }) => number(row.device.rejected ?? 0) },
          { name: 'State', show: deviceState },
        ],
      }),
      pages(['devices'], query, total, PAGE),
    ];
  },
};

export function deviceState({ row }) {
  if (row.revoked) return chip('revoked', 'rejected');
  const { error, error_ms: at, last_ms: last } = row.device;
  // An error that a later request did not meet is over.
  if (error && (at ?? 0) >= last) return chip(error, 'conflict');
  return row.behind ? chip('behind', 'conflict') : chip('up to date', 'pushed');
}
