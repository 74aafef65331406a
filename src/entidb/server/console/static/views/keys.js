// The keys that tokens are signed with, and who is locked out.

import { question } from '../dialog.js';
import { el } from '../dom.js';
import { moment } from '../format.js';
import { button, chip, databaseLink, section, table, when } from '../parts.js';

export const keys = {
  title: () => 'Keys and access',
  every: 5000,
  async load(asked, get) {
    const [found, revoked] = await Promise.all([
      get(['keys']).catch((error) => (error.status === 400 || error.status === 403 ? { refused: error.message } : Promise.reject(error))),
      get(['revoked']),
    ]);
    return { found, revoked };
  },
  draw({ found, revoked }, asked, act) {
    return [
      section('Keys', found.refused ? el('p', { class: 'empty' }, found.refused) : keyTable(found, act)),
      section('Locked out', table({
        label: 'Who is locked out', rows: revoked, key: (row) => `${row.kind}/${row.name}/${row.db_id ?? ''}`, empty: 'Nobody is locked out.',
        columns: [
          { name: 'Kind', show: (row) => row.kind },
          { name: 'Name', show: (row) => el('code', {}, row.name) },
          { name: 'Where', show: (row) => (row.db_id ? databaseLink(row.db_id) : 'everywhere') },
          { name: 'Since', show: (row) => when(row.since_ms) },
          { name: 'By', show: (row) => row.by },
          { name: 'Reason', show: (row) => row.reason ?? '' },
          { name: '', show: (row) => button('Let in again', () => allow(row, act)) },
        ],
      })),
    ];
  },
};

function keyTable(rows, act) {
  return [
    el('div', { class: 'tools' }, button('Read the keys again', () => act.change('POST', ['keys', 'reload'], {}, 'The keys are read again.'))),
    table({
      label: 'Keys', rows, key: (row) => row.kid ?? '', empty: 'This server checks tokens in a way of its own.',
      columns: [
        { name: 'Name (kid)', show: (row) => row.kid ?? 'the only one' },
        { name: 'Algorithm', show: (row) => row.algorithm },
        { name: 'From', show: (row) => (row.begins ? moment(row.begins * 1000) : 'always') },
        { name: 'Until', show: (row) => (row.ends ? moment(row.ends * 1000) : 'for ever') },
        { name: 'State', show: state },
      ],
    }),
  ];
}

function state(row) {
  const now = Date.now() / 1000;
  if (row.ends && row.ends < now) return chip('ended', 'rejected');
  if (row.begins && row.begins > now) return chip('not yet', 'conflict');
  return chip('in force', 'pushed');
}

async function allow(row, act) {
  const given = await question({ title: 'Let in again', text: `The ${row.kind} ${row.name} may come again.`, action: 'Let in' });
  if (given) await act.change('DELETE', ['revoked'], { kind: row.kind, name: row.name, database: row.db_id ?? null }, `The ${row.kind} may come again.`);
}
