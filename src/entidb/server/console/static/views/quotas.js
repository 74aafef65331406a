// What databases and devices use of what they may, the fullest first.

import { bar } from '../chart.js';
import { el } from '../dom.js';
import { bytes, number, plural } from '../format.js';
import { chip, databaseLink, figures, pages, section, table } from '../parts.js';

const PAGE = 100;
const NAMES = {
  database_bytes_max: 'Size', database_entities_max: 'Entities', database_devices_max: 'Devices',
  subject_devices_max: 'Devices of a subject',
  database_requests_per_s: 'Requests to a database, a second', subject_requests_per_s: 'Requests of a subject, a second',
};

export const quotas = {
  title: () => 'Quotas',
  every: 5000,
  load: (asked, get) => get(['quotas'], { offset: Number(asked.query.offset) || 0, limit: PAGE }),
  draw({ settings, total, rows }, asked) {
    const set = Object.keys(NAMES).filter((name) => settings[name]);
    if (!set.length) {
      return el('p', { class: 'empty' }, 'This server has no quotas. Its settings database_bytes_max, database_entities_max, '
        + 'database_devices_max, subject_devices_max, database_requests_per_s and subject_requests_per_s set some.');
    }
    return [
      figures(set.map((name) => [NAMES[name], amount(name, settings[name]), 'at most'])),
      section('In use', quotaTable(rows, true), pages(['quotas'], asked.query, total, PAGE)),
    ];
  },
};

// Rows of `quotas`; the view of one database leaves its name out.
export function quotaTable(rows, named) {
  return table({
    label: 'Quotas in use', rows, key: (row) => `${row.database}/${row.quota}/${row.subject ?? ''}`,
    empty: 'No database has a quota of what it holds, or none has been used yet.',
    columns: [
      named ? { name: 'Database', show: (row) => databaseLink(row.database) } : null,
      { name: 'Quota', show: (row) => [NAMES[row.quota], row.subject === undefined ? '' : `: ${row.subject}`] },
      { name: 'Used', kind: 'number', show: (row) => (row.used === undefined ? 'not known' : amount(row.quota, row.used)) },
      { name: 'Allowed', kind: 'number', show: (row) => amount(row.quota, row.allowed) },
      { name: 'Part', show: part },
      { name: 'State', show: state },
    ].filter(Boolean),
  });
}

function amount(quota, value) {
  return quota === 'database_bytes_max' ? bytes(value) : number(value);
}

function percent(row) {
  return Math.floor((100 * row.used) / row.allowed);
}

function part(row) {
  if (row.used === undefined) return '';
  return [bar(row.used, row.allowed, `${percent(row)} percent used`), el('span', { class: 'note' }, `${percent(row)} %`)];
}

function state(row) {
  if (row.used === undefined) return chip('known when it is open');
  if (row.used >= row.allowed) return chip('full', 'rejected');
  return row.used >= 0.8 * row.allowed ? chip('nearly full', 'conflict') : chip('room', 'pushed');
}

export function quotaSection(found) {
  const left = found.total - found.rows.length;
  return section('Quotas', quotaTable(found.rows, false), left > 0 ? el('p', { class: 'note' }, `and ${plural(left, 'more')}`) : null);
}
