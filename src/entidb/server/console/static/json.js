// Values of entities as text, as a flat list of fields, and two of them compared.

const FIELDS_MAX = 500;

// In a cell of a table: one line, without quotes around a text.
export function brief(value) {
  if (value === undefined) return '–';
  if (typeof value === 'string') return value.length > 80 ? `${value.slice(0, 80)}…` : value;
  if (value !== null && typeof value === 'object') {
    if (typeof value.$more === 'string') return value.$more;
    if (typeof value.$bytes === 'string') return `bytes ${value.$bytes.slice(0, 24)}`;
    if (typeof value.$int === 'string') return value.$int;
    const text = JSON.stringify(value);
    return text.length > 80 ? `${text.slice(0, 80)}…` : text;
  }
  return String(value);
}

export function isMap(value) {
  return value !== null && typeof value === 'object' && !Array.isArray(value);
}

// [['address.city', '"Oslo"'], …], bounded.
export function flat(value) {
  const found = [];
  const walk = (path, each) => {
    if (found.length >= FIELDS_MAX) return;
    const inner = isMap(each) && Object.keys(each).length && !Object.keys(each)[0].startsWith('$');
    if (inner) for (const [name, one] of Object.entries(each)) walk(path ? `${path}.${name}` : name, one);
    else found.push([path || '(value)', each === undefined ? undefined : JSON.stringify(each)]);
  };
  walk('', value);
  return found;
}

// One row for each field of either: { field, left, right, changed }.
export function compare(left, right) {
  const before = new Map(left === undefined ? [] : flat(left));
  const after = new Map(right === undefined ? [] : flat(right));
  const names = [...new Set([...before.keys(), ...after.keys()])];
  return names.map((field) => ({
    field, left: before.get(field), right: after.get(field), changed: before.get(field) !== after.get(field),
  }));
}
