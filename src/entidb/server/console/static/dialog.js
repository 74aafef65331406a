// Questions before something is changed. The native dialog keeps the focus inside and ends with
// Escape. `ask` resolves to what was filled in, or null.

import { el } from './dom.js';

// `fields`: [{ name, label, value, must }], `must`: exactly what has to be typed. `twice` is a
// second question, asked after the first was answered.
export function question({ title, text, action, fields = [], danger = false, twice }) {
  return new Promise((resolve) => {
    const before = document.activeElement;
    const inputs = new Map();
    let asked = !twice;
    let answer = null;
    const go = el('button', { type: 'submit', class: danger ? 'danger' : 'main' }, asked ? action : `${action}…`);
    const words = el('p', { id: 'dialog-text' }, text);
    const wrong = el('p', { class: 'wrong', role: 'alert' });
    const cancel = el('button', { type: 'button', onclick: () => box.close() }, 'Cancel');
    const form = el('form', {
      onsubmit: (event) => {
        event.preventDefault();
        const missed = fields.find((field) => field.must && inputs.get(field.name).value !== field.must);
        if (missed) {
          wrong.textContent = `Type ${missed.must} to go on.`;
          inputs.get(missed.name).focus();
          return;
        }
        if (!asked) {
          asked = true;
          words.textContent = twice;
          go.textContent = action;
          cancel.focus();
          return;
        }
        answer = Object.fromEntries([...inputs].map(([name, input]) => [name, input.value]));
        box.close();
      },
    }, words, fields.map((field) => {
      const input = el('input', { type: 'text', value: field.value ?? '', autocomplete: 'off', spellcheck: 'false' });
      inputs.set(field.name, input);
      return el('label', { class: 'field' }, el('span', {}, field.label), input);
    }), wrong, el('div', { class: 'buttons' }, cancel, go));
    const box = el('dialog', { 'aria-labelledby': 'dialog-title', 'aria-describedby': 'dialog-text' },
      el('h2', { id: 'dialog-title' }, title), form);
    box.addEventListener('close', () => {
      box.remove();
      if (before && before.isConnected) before.focus();
      resolve(answer);
    });
    document.body.append(box);
    box.showModal();
    (fields.length ? inputs.get(fields[0].name) : cancel).focus();
  });
}
