// One device in one database: what is known of it, what happened to it lately, and locking it out.

import { question } from '../dialog.js';
import { el } from '../dom.js';
import { bytes, number, plural } from '../format.js';
import { button, chip, databaseLink, figures, section, table, when } from '../parts.js';
import { touchedList } from './conflicts.js';
import { deviceState } from './devices.js';

export const device = {
  title: (asked) => `Device ${(asked.parts[1] ?? '').slice(0, 8)}`,
  every: 3000,
  async load({ parts }, get) {
    return get(['databases', parts[0] ?? '', 'devices', parts[1] ?? '']);
  },
  draw({ row, happened }, { parts }, act) {
    const database = parts[0];
    const found = row.device;
    return [
      el('p', {}, deviceState({ row }), ' in ', databaseLink(database)),
      actions(row, database, act),
      figures([
        ['Subject', found.subject || '–'],
        ['Behind', row.behind === null || row.behind === undefined ? '–' : plural(row.behind, 'commit'), `has commit ${number(found.cursor ?? 0)}`],
        ['Last seen', when(found.last_ms)], ['First seen', when(found.first_ms)],
        ['Requests', number(found.requests ?? 0)], ['Accepted', number(found.accepted ?? 0), 'transactions'],
        ['Conflicts', number(found.conflicts ?? 0)], ['Rejected', number(found.rejected ?? 0)],
        ['Sent', bytes(found.bytes_in ?? 0)], ['Received', bytes(found.bytes_out ?? 0)],
        ['Last error', found.error ?? 'none', found.error ? when(found.error_ms) : null],
      ]),
      el('dl', { class: 'facts' },
        fact('Device id', el('code', {}, found.device_id)), fact('Program', found.client ?? '–'),
        fact('Schema', found.schema ?? '–'), fact('Token (jti)', found.token ? el('code', {}, found.token) : '–')),
      section('Lately', table({
        label: 'What happened to this device lately', rows: happened, key: (each) => each.number,
        empty: 'No push and no refusal since this server started.',
        columns: [
          { name: 'When', show: (each) => when(each.at_ms) },
          { name: 'What', show: (each) => chip(each.what, each.what) },
          { name: 'More', show: (each) => story(each) },
          { name: 'Entities', show: (each) => touchedList(each) },
        ],
      })),
    ];
  },
};

function story(each) {
  if (each.what === 'pushed') return `${plural(each.count ?? 1, 'transaction')}, up to commit ${number(each.version)}`;
  return [each.code, each.message].filter(Boolean).join(': ') || 'built on an older version';
}

function fact(name, value) {
  return el('div', {}, el('dt', {}, name), el('dd', {}, value));
}

function actions(row, database, act) {
  const found = row.device;
  const kinds = [['device', found.device_id, 'this device'], ['subject', found.subject, `everything of ${found.subject}`],
    ['token', found.token, 'this token']].filter(([, name]) => name);
  return el('div', { class: 'tools' },
    row.revoked ? button('Let in again', () => allow(kinds, database, act)) : null,
    row.revoked ? null : kinds.map(([kind, name, words]) => button(`Revoke ${kind}`, () => revoke(kind, name, words, database, act), 'danger')));
}

async function revoke(kind, name, words, database, act) {
  const given = await question({
    title: `Revoke the ${kind}`, danger: true, action: 'Revoke',
    text: `This locks ${words} out of ${database} at once, also streams that are open. It keeps its work, and can be let in again.`,
    twice: `Asked once more: lock ${words} out of ${database} now?`,
    fields: [{ name: 'reason', label: 'Reason, for the audit log' }],
  });
  if (given) await act.change('POST', ['revoked'], { kind, name, database, reason: given.reason }, `The ${kind} is revoked.`);
}

async function allow(kinds, database, act) {
  const given = await question({ title: 'Let in again', text: `What locks it out of ${database} is taken back.`, action: 'Let in' });
  if (!given) return;
  for (const [kind, name] of kinds) {
    await act.change('DELETE', ['revoked'], { kind, name, database }, `The ${kind} may come again.`);
  }
}
