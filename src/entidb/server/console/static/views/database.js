// One database: its figures, its collections, how it has grown, its devices by how far they are
// behind, and what can be done with it.

import { bar, lineChart } from '../chart.js';
import { question } from '../dialog.js';
import { el } from '../dom.js';
import { bytes, duration, now, number, plural } from '../format.js';
import { button, chip, deviceLink, figures, link, section, table, when } from '../parts.js';
import { state } from './databases.js';
import { imageSection } from './images.js';
import { quotaSection } from './quotas.js';

export const database = {
  title: (asked) => asked.parts[0] ?? 'Database',
  every: 4000,
  async load(asked, get) {
    const name = asked.parts[0] ?? '';
    const [row, collections, devices, backups, quotas, images] = await Promise.all([
      get(['databases', name]), get(['databases', name, 'collections']),
      get(['devices'], { database: name, sort: 'behind', limit: 20 }),
      get(['backups']).catch((error) => (error.status === 400 ? [] : Promise.reject(error))),
      get(['quotas'], { database: name }), get(['images'], { database: name }),
    ]);
    return { row, collections, devices, quotas, images, backups: backups.filter((each) => each.database === name) };
  },
  draw({ row, collections, devices, backups, quotas, images }, asked, act) {
    return [
      el('p', {}, state(row), row.frozen?.reason ? ` ${row.frozen.reason}` : ''),
      actions(row, act),
      figures([
        ['Entities', number(row.entities)], ['Size', bytes(row.bytes)], ['Devices', number(row.devices)],
        ['Head', number(row.head), 'newest commit'], ['Floor', number(row.floor), 'deletions forgotten up to'],
        ['Last used', when(row.used_ms)],
      ]),
      section('Collections', table({
        label: 'Collections', rows: collections, key: (each) => each.name, empty: 'No collection yet.',
        columns: [
          { name: 'Name', show: (each) => el('a', { href: link(['entities'], { database: row.name, collection: each.name }) }, each.name) },
          { name: 'Entities', kind: 'number', show: (each) => number(each.entities) },
          { name: 'Devices get it', show: (each) => (each.synced ? 'yes' : chip('no, local')) },
        ],
      })),
      growth(row, backups),
      quotas.rows.length ? quotaSection(quotas) : null,
      images.length ? imageSection(images) : null,
      section('Devices by lag', lag(row, devices), devices.total > 20
        ? el('p', {}, el('a', { href: link(['devices'], { database: row.name }) }, `All ${plural(devices.total, 'device')}`)) : null),
    ];
  },
};

function growth(row, backups) {
  const points = [...backups].sort((a, b) => a.made_ms - b.made_ms).slice(-100);
  if (!points.length) {
    return section('Growth', el('p', { class: 'empty' }, 'Each backup is a point of this chart, and there is none yet.'));
  }
  const note = `${plural(points.length, 'backup')} in ${duration(now() - points[0].made_ms)}, and now`;
  return section('Growth', el('div', { class: 'charts' },
    lineChart({ title: 'Entities', note, show: (value) => number(Math.round(value)), series: [{ name: 'now', kind: 'one', values: [...points.map((each) => each.entities), row.entities] }] }),
    lineChart({ title: 'Size', note, show: bytes, series: [{ name: 'now', kind: 'two', values: [...points.map((each) => each.bytes), row.bytes] }] })));
}

function lag(row, devices) {
  const most = Math.max(1, ...devices.rows.map((each) => each.row.behind ?? 0));
  return table({
    label: 'Devices by lag', rows: devices.rows, key: (each) => each.row.device.device_id, empty: 'No device has come yet.',
    columns: [
      { name: 'Device', show: (each) => deviceLink(row.name, each.row.device) },
      { name: 'Behind', kind: 'number', show: (each) => number(each.row.behind) },
      { name: 'Lag', show: (each) => bar(each.row.behind ?? 0, most, plural(each.row.behind ?? 0, 'commit')) },
      { name: 'Last seen', show: (each) => when(each.row.device.last_ms) },
      { name: 'State', show: (each) => (each.row.revoked ? chip('revoked', 'rejected') : each.row.device.error ? chip(each.row.device.error, 'conflict') : chip('ok', 'pushed')) },
    ],
  });
}

function actions(row, act) {
  const at = ['databases', row.name];
  const task = (what, body, done) => act.change('POST', [...at, what], body, done);
  return el('div', { class: 'tools' },
    button('Back up now', () => task('backup', {}, 'The backup is on its way.'), 'main'),
    button('Verify', () => task('verify', {}, 'The check is on its way.')),
    button('Compact', () => compact(row, task)),
    row.frozen ? button('Thaw', () => task('thaw', {}, `${row.name} takes pushes again.`)) : button('Freeze', () => freeze(row, task)),
    button('Delete', () => remove(row, act), 'danger'),
    el('a', { class: 'button', href: link(['backups'], { database: row.name }) }, 'Backups and tasks'));
}

async function compact(row, task) {
  const given = await question({ title: `Compact ${row.name}`, text: 'Requests to this database wait until it is done.', action: 'Compact' });
  if (given) await task('compact', {}, 'The compaction is on its way.');
}

async function freeze(row, task) {
  const given = await question({
    title: `Freeze ${row.name}`, text: 'It takes no pushes until it is thawed; devices keep their changes.', action: 'Freeze',
    fields: [{ name: 'reason', label: 'Reason' }],
  });
  if (given) await task('freeze', given, `${row.name} is frozen.`);
}

async function remove(row, act) {
  const given = await question({
    title: `Delete ${row.name}`, danger: true, action: 'Delete',
    text: 'Its devices are refused from now on. It can be taken back for a day.',
    fields: [{ name: 'confirm', label: `Type ${row.name}`, must: row.name }],
  });
  if (given && await act.change('DELETE', ['databases', row.name], given, `${row.name} is put aside for a day.`)) {
    location.hash = link(['databases']);
  }
}
