// The form that asks for the token of an administrator.

import { el } from './dom.js';

export function signInForm(enter, reason) {
  const wrong = el('p', { class: 'wrong', role: 'alert' }, reason);
  const field = el('input', {
    id: 'token', type: 'password', autocomplete: 'off', spellcheck: 'false', autocapitalize: 'none',
    'aria-describedby': 'token-note',
  });
  const go = el('button', { type: 'submit', class: 'main' }, 'Sign in');
  const form = el('form', {
    class: 'signin',
    onsubmit: async (event) => {
      event.preventDefault();
      go.disabled = true;
      wrong.textContent = '';
      try {
        await enter(field.value.trim());
      } catch (error) {
        wrong.textContent = error.message;
        field.focus();
        field.select();
      } finally {
        go.disabled = false;
      }
    },
  },
  el('h1', {}, 'Sign in'),
  el('label', { for: 'token' }, 'Token of an administrator'), field,
  el('p', { id: 'token-note', class: 'note' }, 'Made with ', el('code', {}, 'entidb token --admin'),
    '. It stays in the memory of this page. A server without authentication needs none.'),
  wrong, el('div', { class: 'buttons' }, go));
  requestAnimationFrame(() => field.focus());
  return form;
}
