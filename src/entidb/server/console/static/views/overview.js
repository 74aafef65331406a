// How the server is doing: a few live charts of this process, and figures.

import { lineChart } from '../chart.js';
import { el } from '../dom.js';
import { bytes, duration, number, plural, setNow, short } from '../format.js';
import { chip, databaseLink, deviceLink, figures, link, section, table, when } from '../parts.js';

const BEAT_S = 2;
const SHOWN = 150;
const LISTS_MS = 6000;
// What was seen of a process; another one that answers begins anew.
let seen = { process: 0, since: 0, beats: [] };
let lists = { at: -LISTS_MS, behind: [], refused: [] };

export const overview = {
  title: () => 'Overview',
  every: 2000,
  async load(asked, get) {
    const known = seen.beats.length ? seen.beats[seen.beats.length - 1].at_ms : 0;
    const state = await get(['overview'], { since: known || '' });
    setNow(state.now_ms);
    gather(state);
    if (performance.now() - lists.at > LISTS_MS) {
      const [behind, refused] = await Promise.all([
        get(['devices'], { sort: 'behind', limit: 5 }),
        get(['happened'], { what: 'conflict,rejected,refused', limit: 5 }),
      ]);
      lists = { at: performance.now(), behind: behind.rows.filter(({ row }) => row.behind), refused };
    }
    return state;
  },
  draw(state) {
    return [warnings(state), charts(), standing(state), nodeList(state), behindList(), refusedList()];
  },
};

function gather(state) {
  if (seen.process !== state.process || seen.since !== state.since_ms) {
    seen = { process: state.process, since: state.since_ms, beats: [] };
  }
  const last = seen.beats.length ? seen.beats[seen.beats.length - 1].at_ms : 0;
  seen.beats.push(...state.beats.filter((beat) => beat.at_ms > last));
  seen.beats = seen.beats.slice(-SHOWN);
}

function charts() {
  const { beats } = seen;
  const rate = (name) => beats.map((beat) => beat[name] / BEAT_S);
  const note = beats.length ? `last ${duration(beats.length * BEAT_S * 1000)}` : 'nothing yet';
  const perSecond = (value) => `${short(value)}/s`;
  const ms = (value) => `${short(value)} ms`;
  return el('div', { class: 'charts' },
    lineChart({
      title: 'Requests', note, show: perSecond,
      series: [{ name: 'all', values: rate('requests'), kind: 'one' }, { name: 'failed', values: rate('failed'), kind: 'bad' }],
    }),
    lineChart({
      title: 'Latency', note, show: ms,
      series: [{ name: 'half', values: beats.map((b) => b.half_ms), kind: 'one' }, { name: '99 of 100', values: beats.map((b) => b.most_ms), kind: 'two' }],
    }),
    lineChart({
      title: 'Commits', note, show: perSecond,
      series: [{ name: 'transactions', values: rate('accepted'), kind: 'one' }],
    }),
    lineChart({
      title: 'Verdicts', note, show: perSecond,
      series: [
        { name: 'accepted', values: rate('accepted'), kind: 'one' },
        { name: 'conflict', values: rate('conflicts'), kind: 'two' },
        { name: 'rejected', values: rate('rejected'), kind: 'bad' },
      ],
    }));
}

function standing(state) {
  const { fleet } = state;
  return figures([
    ['Databases', number(fleet.databases), `${number(state.open_databases)} open`],
    ['Devices', number(fleet.devices), fleet.revoked ? `${number(fleet.revoked)} revoked` : null],
    ['Behind', number(fleet.behind), 'of the devices'],
    ['Listening', number(state.waiting), 'wait for news'],
    ['Memory', bytes(state.memory_bytes), `${bytes(state.in_flight_bytes)} in flight`],
    ['Disk free', bytes(state.disk_free_bytes), state.disk_bytes ? `of ${bytes(state.disk_bytes)}` : 'in memory'],
    ['Tasks', number(state.tasks), state.tasks_failed ? `${number(state.tasks_failed)} failed` : 'wait or run'],
    ['Up', duration(state.now_ms - state.since_ms), `version ${state.version}`],
  ]);
}

function warnings(state) {
  const found = [];
  if (state.late_backups.length) found.push(`Backups are late: ${state.late_backups.slice(0, 5).join(', ')}`);
  if (state.disk_bytes && state.disk_free_bytes < 0.05 * state.disk_bytes) found.push('The disk is nearly full.');
  if (state.tasks_failed) found.push(`${plural(state.tasks_failed, 'task')} failed.`);
  return el('div', { class: 'warnings' }, found.map((text) => el('p', { class: 'warning' }, text)));
}

function nodeList(state) {
  if (state.nodes.length < 2) return null;
  return section('Nodes', table({
    label: 'Nodes of this server', rows: state.nodes, key: (each) => each.name,
    empty: '',
    columns: [
      { name: 'Name', show: (each) => each.name },
      { name: 'Duty', show: (each) => (each.on_duty ? chip('done', 'on duty') : '') },
      { name: 'Version', show: (each) => each.version },
      { name: 'Up', show: (each) => duration(state.now_ms - each.began_ms) },
      { name: 'Last seen', show: (each) => when(each.seen_ms) },
    ],
  }));
}

function behindList() {
  return section('Most behind', table({
    label: 'Devices that are most behind', rows: lists.behind, key: ({ row }) => row.device.device_id,
    empty: 'Every device has all commits.',
    columns: [
      { name: 'Device', show: ({ database, row }) => deviceLink(database, row.device) },
      { name: 'Database', show: ({ database }) => databaseLink(database) },
      { name: 'Behind', kind: 'number', show: ({ row }) => plural(row.behind, 'commit') },
      { name: 'Last seen', show: ({ row }) => when(row.device.last_ms) },
    ],
  }));
}

function refusedList() {
  return section('Latest conflicts and refusals', table({
    label: 'Latest conflicts and refusals', rows: lists.refused, key: (each) => each.number,
    empty: 'Nothing was refused lately.',
    columns: [
      { name: 'When', show: (each) => when(each.at_ms) },
      { name: 'What', show: (each) => chip(each.what, each.what) },
      { name: 'Device', show: (each) => deviceLink(each.database, each) },
      { name: 'Database', show: (each) => databaseLink(each.database) },
      { name: 'Why', show: (each) => each.message ?? each.code ?? '–' },
    ],
  }), el('p', {}, el('a', { href: link(['conflicts']) }, 'All conflicts and rejections')));
}
