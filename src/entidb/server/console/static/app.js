// The page: signing in, the frame with its views, and asking again while one is looked at.

import { ask, isSignedIn, signIn, signOut } from './api.js';
import { el, morph } from './dom.js';
import { setNow } from './format.js';
import { route } from './router.js';
import { signInForm } from './signin.js';
import { overview } from './views/overview.js';

const VIEWS = [
  ['overview', 'Overview', async () => overview],
  ['databases', 'Databases', async () => (await import('./views/databases.js')).databases],
  ['devices', 'Devices', async () => (await import('./views/devices.js')).devices],
  ['entities', 'Entities', async () => (await import('./views/entities.js')).entities],
  ['conflicts', 'Conflicts', async () => (await import('./views/conflicts.js')).conflicts],
  ['quotas', 'Quotas', async () => (await import('./views/quotas.js')).quotas],
  ['images', 'Images', async () => (await import('./views/images.js')).images],
  ['backups', 'Backups and tasks', async () => (await import('./views/backups.js')).backups],
  ['audit', 'Audit log', async () => (await import('./views/audit.js')).audit],
  ['keys', 'Keys and access', async () => (await import('./views/keys.js')).keys],
];
// Views of one thing, and the entry of the menu that they belong to.
const INNER = {
  database: ['databases', async () => (await import('./views/database.js')).database],
  device: ['devices', async () => (await import('./views/device.js')).device],
  entity: ['entities', async () => (await import('./views/entity.js')).entity],
};

const main = document.getElementById('main');
const nav = document.getElementById('nav');
const menu = document.getElementById('menu');
const leave = document.getElementById('leave');
const said = document.getElementById('said');
let showing = null;

export function say(text, kind = '') {
  const line = el('p', { class: kind }, text);
  said.append(line);
  setTimeout(() => line.remove(), 5000);
  while (said.childElementCount > 3) said.firstElementChild.remove();
}

// ------------------------------------------------------------ signed in or not

async function enter(token) {
  signIn(token);
  try {
    const answer = await ask('GET', ['overview']);
    setNow(answer.now_ms);
    document.getElementById('where').textContent = location.host;
  } catch (error) {
    signOut();
    throw error;
  }
  menu.hidden = leave.hidden = nav.hidden = false;
  await open(true);
}

function exit(reason) {
  showing?.stop();
  showing = null;
  signOut();
  menu.hidden = leave.hidden = nav.hidden = true;
  document.title = 'EntiDB console';
  main.replaceChildren(signInForm(enter, reason));
}

// ------------------------------------------------------------ one view

async function open(fresh) {
  if (!isSignedIn()) return;
  const asked = route();
  const same = !fresh && showing && showing.asked.name === asked.name
    && showing.asked.parts.join('/') === asked.parts.join('/');
  showing?.stop();
  const found = VIEWS.find(([name]) => name === asked.name);
  const [owner, load] = found ? [found[0], found[2]] : INNER[asked.name] ?? ['overview', VIEWS[0][2]];
  navigation(owner);
  const now = new Shown(asked);
  showing = now;
  const view = await load();
  if (showing === now) now.run(view, same);
}

class Shown {
  constructor(asked) {
    this.asked = asked;
    this.ended = new AbortController();
    this.again = () => {};
  }

  stop() {
    this.ended.abort();
    this.again();
  }

  run(view, same) {
    const title = view.title(this.asked);
    document.title = `${title} – EntiDB console`;
    if (!same) {
      const heading = el('h1', { tabindex: -1 }, title);
      main.replaceChildren(heading, el('div', { class: 'view', 'aria-busy': 'true' }, el('p', { class: 'empty' }, 'Loading…')));
      heading.focus({ preventScroll: true });
      window.scrollTo(0, 0);
    }
    this.loop(view);
  }

  async loop(view) {
    const { signal } = this.ended;
    const act = { refresh: () => this.again(), change: (...given) => this.change(...given), say };
    while (!signal.aborted) {
      let content;
      try {
        const data = await view.load(this.asked, (path, query) => ask('GET', path, { query, signal }));
        content = view.draw(data, this.asked, act);
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 401) {
          exit('The token is not valid any more. Sign in with another one.');
          return;
        }
        if (error.status === undefined) throw error;
        content = el('p', { class: 'wrong', role: 'alert' }, error.message);
      }
      if (signal.aborted) return;
      if (!isSelecting()) morph(main.querySelector('.view'), el('div', { class: 'view' }, content));
      await this.pause(view.every ?? 5000);
    }
  }

  // Until it is time, or somebody wants to know now, and somebody looks.
  async pause(ms) {
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.again = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    while (document.hidden && !this.ended.signal.aborted) {
      await new Promise((resolve) => {
        document.addEventListener('visibilitychange', resolve, { once: true });
        this.again = resolve;
      });
    }
  }

  async change(method, path, body, done) {
    try {
      const answer = await ask(method, path, { body });
      say(done, 'good');
      this.again();
      return answer;
    } catch (error) {
      say(error.message, 'bad');
      return null;
    }
  }
}

// What a person marks to copy it would be lost.
function isSelecting() {
  const selection = getSelection();
  return !selection.isCollapsed && main.contains(selection.anchorNode);
}

function navigation(current) {
  nav.replaceChildren(el('ul', {}, VIEWS.map(([name, text]) => el('li', {},
    el('a', { href: `#/${name}`, 'aria-current': name === current ? 'page' : null }, text)))));
  menu.setAttribute('aria-expanded', 'false');
}

menu.onclick = () => menu.setAttribute('aria-expanded', String(menu.getAttribute('aria-expanded') !== 'true'));
leave.onclick = () => exit('');
window.addEventListener('hashchange', () => open(false));
exit('');
