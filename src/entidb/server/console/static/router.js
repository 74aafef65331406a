// Which view an address shows: `#/devices?search=ada` is the view `devices` with that query.

export function route() {
  const text = location.hash.replace(/^#\/?/, '');
  const cutAt = text.indexOf('?');
  const path = cutAt < 0 ? text : text.slice(0, cutAt);
  const query = Object.fromEntries(new URLSearchParams(cutAt < 0 ? '' : text.slice(cutAt + 1)));
  const parts = path.split('/').filter(Boolean).map(decoded);
  return { name: parts[0] ?? 'overview', parts: parts.slice(1), query };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

// Another query for the same view, in the place of this one in the browser's history.
export function refine(changes) {
  const { name, parts, query } = route();
  const merged = Object.entries({ ...query, ...changes }).filter(([, value]) => value);
  const tail = merged.length ? `?${new URLSearchParams(merged)}` : '';
  const path = [name, ...parts].map(encodeURIComponent).join('/');
  history.replaceState(null, '', `#/${path}${tail}`);
  window.dispatchEvent(new Event('hashchange'));
}
