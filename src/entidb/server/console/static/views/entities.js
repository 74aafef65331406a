// A page of a collection, filtered and sorted as queries are, and the way to one entity.

import { el } from '../dom.js';
import { bytes, number, plural } from '../format.js';
import { brief, isMap } from '../json.js';
import { link, selectField, table, when } from '../parts.js';
import { refine } from '../router.js';

const PAGE = 50;
const COLUMNS = 6;
const SIGNS = [['==', 'is'], ['!=', 'is not'], ['<', '<'], ['<=', '≤'], ['>', '>'], ['>=', '≥'], ['startswith', 'begins with'], ['contains', 'contains']];
const FIRST = { after: '', page: '' };

export const entities = {
  title: () => 'Entities',
  every: 10000,
  async load({ query }, get) {
    const databases = (await get(['databases'])).map((row) => row.name);
    const database = query.database ?? databases[0];
    if (!database) return { databases, collections: [] };
    const collections = await get(['databases', database, 'collections']);
    const collection = collections.some((each) => each.name === query.collection) ? query.collection : collections[0]?.name;
    if (!collection) return { databases, database, collections };
    const asked = { collection, where: condition(query), order: query.order, after: query.after, limit: PAGE };
    const page = await get(['databases', database, 'entities'], asked).catch((error) => {
      if (error.status !== 400) throw error;
      return { rows: [], entities: 0, refused: error.message };
    });
    return { databases, database, collections, collection, page };
  },
  draw(found, { query }) {
    if (!found.database) return el('p', { class: 'empty' }, 'There is no database yet.');
    return [
      el('div', { class: 'tools' },
        selectField({ label: 'Database', value: found.database, options: found.databases.map((name) => [name, name]), change: (database) => refine({ database, collection: '', field: '', order: '', ...FIRST }) }),
        found.collection ? selectField({
          label: 'Collection', value: found.collection, options: found.collections.map((each) => [each.name, `${each.name} (${number(each.entities)})`]),
          change: (collection) => refine({ collection, field: '', order: '', ...FIRST }),
        }) : null),
      found.collection ? [search(found, query), result(found, query)] : el('p', { class: 'empty' }, 'This database has no collection yet.'),
    ];
  },
};

function condition({ field, sign, text }) {
  if (!field || text === undefined) return '';
  return JSON.stringify({ [field]: { [sign ?? '==']: wanted(text ?? '') } });
}

// What is written as JSON is meant so; else it is a text.
function wanted(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function search(found, query) {
  const value = (form, name) => form.elements[name].value.trim();
  return [
    el('form', {
      class: 'tools', 'aria-label': 'Filter and sort',
      onsubmit: (event) => {
        event.preventDefault();
        const form = event.target;
        refine({ field: value(form, 'field'), sign: value(form, 'sign'), text: value(form, 'text'), order: value(form, 'order'), ...FIRST });
      },
    },
    input('Field', 'field', query.field ?? ''),
    el('label', { class: 'field' }, el('span', {}, 'Comparison'), el('select', { name: 'sign' }, SIGNS.map(([sign, text]) => el('option', { value: sign, selected: sign === (query.sign ?? '==') }, text)))),
    input('Value', 'text', query.text ?? ''),
    input('Sort by (-field: largest first)', 'order', query.order ?? ''),
    el('button', { type: 'submit', class: 'main' }, 'Find'),
    query.field || query.order ? el('a', { class: 'button', href: link(['entities'], { database: found.database, collection: found.collection }) }, 'Everything') : null),
    el('form', {
      class: 'tools', 'aria-label': 'Find by id',
      onsubmit: (event) => {
        event.preventDefault();
        const id = value(event.target, 'id').replaceAll('-', '').toLowerCase();
        if (id) location.hash = link(['entity', found.database, found.collection, id]);
      },
    }, input('Id of an entity', 'id', ''), el('button', { type: 'submit' }, 'Open')),
  ];
}

function input(label, name, value) {
  return el('label', { class: 'field' }, el('span', {}, label), el('input', { type: 'text', name, value, autocomplete: 'off', spellcheck: 'false', autocapitalize: 'none' }));
}

function result({ database, collection, page }, query) {
  if (page.refused) return el('p', { class: 'wrong', role: 'alert' }, page.refused);
  const number_ = Number(query.page) || 1;
  return [
    el('p', { class: 'note' }, `${plural(page.entities, 'entity', 'entities')} in ${collection}`),
    table({
      label: `Entities of ${collection}`, rows: page.rows, key: (row) => row.id,
      empty: query.field ? 'No entity matches.' : 'Nothing here.', columns: columns(database, collection, page.rows),
    }),
    page.after || query.after ? el('nav', { class: 'tools', 'aria-label': 'Pages' },
      query.after ? el('a', { class: 'button', href: link(['entities'], { ...query, ...FIRST }) }, '⇤ First page') : null,
      el('span', { class: 'note' }, `page ${number(number_)}`),
      page.after ? el('a', { class: 'button', href: link(['entities'], { ...query, database, collection, after: page.after, page: number_ + 1 }) }, 'After →') : null) : null,
  ];
}

function columns(database, collection, rows) {
  const names = [...new Set(rows.flatMap((row) => (isMap(row.value) ? Object.keys(row.value) : [])))].slice(0, COLUMNS);
  return [
    { name: 'Id', show: (row) => el('a', { href: link(['entity', database, collection, row.id.replaceAll('-', '')]) }, el('code', {}, row.id.slice(0, 8))) },
    ...names.map((name) => ({ name, show: (row) => (isMap(row.value) ? brief(row.value[name]) : '–') })),
    rows.some((row) => !isMap(row.value)) ? { name: 'Value', show: (row) => (isMap(row.value) ? '–' : brief(row.value)) } : null,
    { name: 'Version', kind: 'number', show: (row) => number(row.version) },
    { name: 'Changed', show: (row) => when(row.changed_ms) },
    { name: 'Size', kind: 'number', show: (row) => bytes(row.bytes) },
  ].filter(Boolean);
}
