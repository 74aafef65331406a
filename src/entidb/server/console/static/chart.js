// Small charts as SVG, with their figures as text beside them: a chart alone says nothing to who
// does not see it.

import { el, svg } from './dom.js';

const WIDTH = 300;
const HEIGHT = 72;

// `series`: [{ name, values, kind }], all of the same length; `show` writes a value.
export function lineChart({ title, series, show, note }) {
  const most = Math.max(1e-9, ...series.flatMap((each) => each.values));
  const said = series.map((each) => `${each.name} ${show(last(each.values))} now, `
    + `${show(Math.max(0, ...each.values))} at most`).join('; ');
  return el('figure', { class: 'chart' },
    el('figcaption', {}, el('span', { class: 'chart-title' }, title), legend(series, show)),
    svg('svg', {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img',
      'aria-label': `${title}: ${said}`,
    },
    svg('line', { class: 'base', x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 }),
    series.map((each) => svg('path', { class: `line ${each.kind}`, d: path(each.values, most) }))),
    el('div', { class: 'chart-foot' }, el('span', {}, note ?? ''),
      el('span', {}, `most ${show(most < 1e-6 ? 0 : most)}`)));
}

function legend(series, show) {
  return el('span', { class: 'legend' }, series.map((each) => el('span', { class: 'key' },
    el('span', { class: `dot ${each.kind}` }),
    `${each.name} `, el('b', {}, show(last(each.values))))));
}

function last(values) {
  return values.length ? values[values.length - 1] : 0;
}

function path(values, most) {
  if (values.length < 2) return '';
  const step = WIDTH / (values.length - 1);
  return values.map((value, at) => `${at ? 'L' : 'M'}${(at * step).toFixed(1)} `
    + `${(HEIGHT - 2 - (value / most) * (HEIGHT - 6)).toFixed(1)}`).join('');
}

// A bar that says how much of `most` a value is.
export function bar(value, most, label) {
  const part = most > 0 ? Math.min(1, value / most) : 0;
  return svg('svg', { class: 'bar', viewBox: '0 0 100 6', preserveAspectRatio: 'none', role: 'img', 'aria-label': label },
    svg('rect', { class: 'bar-back', width: 100, height: 6, rx: 2 }),
    svg('rect', { class: 'bar-part', width: (part * 100).toFixed(1), height: 6, rx: 2 }));
}
