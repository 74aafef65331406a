// Numbers, sizes and moments as a person reads them.

const WHOLE = new Intl.NumberFormat('en');
const SHORT = new Intl.NumberFormat('en', { maximumFractionDigits: 1 });
const MOMENT = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'medium' });
const STEPS = [[1, 's'], [60, 'min'], [3600, 'h'], [86400, 'd']];
const SIZES = ['B', 'kB', 'MB', 'GB', 'TB'];
let ahead = 0;

// The server's clock counts, not that of the browser.
export function setNow(serverMs) {
  ahead = serverMs - Date.now();
}

export function now() {
  return Date.now() + ahead;
}

export function number(value) {
  return value === null || value === undefined ? '–' : WHOLE.format(value);
}

export function short(value) {
  return value >= 100 ? WHOLE.format(Math.round(value)) : SHORT.format(value);
}

export function bytes(value) {
  if (value === null || value === undefined) return '–';
  let at = 0;
  let rest = value;
  while (rest >= 1000 && at < SIZES.length - 1) {
    rest /= 1000;
    at += 1;
  }
  return `${at === 0 ? rest : short(rest)} ${SIZES[at]}`;
}

export function duration(ms) {
  const seconds = Math.max(0, ms / 1000);
  let found = STEPS[0];
  for (const step of STEPS) if (seconds >= step[0]) found = step;
  return `${Math.floor(seconds / found[0])} ${found[1]}`;
}

export function ago(ms) {
  if (!ms) return 'never';
  const past = now() - ms;
  return past < 2000 ? 'now' : `${duration(past)} ago`;
}

export function moment(ms) {
  return ms ? MOMENT.format(new Date(ms)) : '–';
}

export function plural(count, one, many = `${one}s`) {
  return `${number(count)} ${count === 1 ? one : many}`;
}
