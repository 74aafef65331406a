// Backups, made and put back, and everything else that takes long, with its progress.

import { question } from '../dialog.js';
import { el } from '../dom.js';
import { bytes, number, plural } from '../format.js';
import { button, chip, databaseLink, link, section, table, when } from '../parts.js';

export const backups = {
  title: () => 'Backups and tasks',
  every: 1500,
  async load(asked, get) {
    const [rows, tasks] = await Promise.all([
      get(['backups']).catch((error) => (error.status === 400 ? { refused: error.message } : Promise.reject(error))),
      get(['tasks']),
    ]);
    return { rows, tasks };
  },
  draw({ rows, tasks }, { query }, act) {
    const only = query.database;
    const mine = (each) => !only || each.database === only;
    return [
      only ? el('p', {}, el('a', { class: 'button', href: link(['backups']) }, `Only ${only} ✕`)) : null,
      rows.refused ? null : el('div', { class: 'tools' }, button(only ? `Back up ${only} now` : 'Back up all now', () => start(only, act), 'main')),
      section('Tasks', taskTable(tasks.filter(mine), act)),
      section('Backups', rows.refused ? el('p', { class: 'empty' }, rows.refused) : backupTable(rows.filter(mine), act)),
    ];
  },
};

function start(only, act) {
  if (only) return act.change('POST', ['databases', only, 'backup'], {}, 'The backup is on its way.');
  return act.change('POST', ['backups'], {}, 'The backups are on their way.');
}

function taskTable(tasks, act) {
  return table({
    label: 'Tasks', rows: tasks, key: (task) => task.id, empty: 'No task has run since the server started.',
    columns: [
      { name: 'Task', show: (task) => task.kind },
      { name: 'Database', show: (task) => (task.database ? databaseLink(task.database) : 'all') },
      { name: 'State', show: (task) => chip(task.state ?? 'waiting', task.state ?? '') },
      { name: 'Progress', show: progress },
      { name: 'Asked', show: (task) => when(task.asked_ms) },
      { name: 'By', show: (task) => task.by },
      { name: '', show: (task) => (task.ended_ms ? '' : button('Cancel', () => act.change('POST', ['tasks', String(task.id), 'cancel'], {}, 'It ends at its next step.'))) },
    ],
  });
}

function progress(task) {
  if (task.error) return task.error;
  if (task.ended_ms) return outcome(task.result ?? {});
  const known = task.total ? { value: task.done ?? 0, max: task.total } : {};
  const node = el('progress', { max: known.max, 'aria-label': `${task.kind} ${task.step ?? ''}` });
  if (known.max) node.setAttribute('value', known.value);
  return (task.state ?? 'waiting') === 'running' ? [node, ` ${task.step ?? ''}`] : '';
}

function outcome(result) {
  return Object.entries(result).filter(([, value]) => value !== null && typeof value !== 'object')
    .map(([name, value]) => `${name} ${name === 'bytes' ? bytes(value) : typeof value === 'number' ? number(value) : value}`).join(', ');
}

function backupTable(rows, act) {
  return table({
    label: 'Backups', rows, key: (row) => `${row.database}/${row.id}`, empty: 'There is no backup yet.',
    columns: [
      { name: 'Made', show: (row) => when(row.made_ms) },
      { name: 'Database', show: (row) => databaseLink(row.database) },
      { name: 'Id', show: (row) => el('code', {}, row.id) },
      { name: 'Entities', kind: 'number', show: (row) => number(row.entities ?? 0) },
      { name: 'Size', kind: 'number', show: (row) => bytes(row.bytes) },
      { name: 'Checked', show: (row) => (row.faults?.length ? chip(plural(row.faults.length, 'fault'), 'rejected') : chip('good', 'pushed')) },
      { name: '', show: (row) => (row.faults?.length ? '' : button('Restore', () => restore(row, act))) },
    ],
  });
}

async function restore(row, act) {
  const given = await question({
    title: `Restore ${row.database}`, danger: true, action: 'Restore',
    text: `The backup ${row.id} takes the place of the database, which is put aside for a day. A new history begins: devices that know of later commits stop until somebody chooses a side.`,
    fields: [{ name: 'confirm', label: `Type ${row.database}`, must: row.database }],
  });
  if (given) await act.change('POST', ['databases', row.database, 'restore'], { backup: row.id, confirm: given.confirm }, 'The restore is on its way.');
}
