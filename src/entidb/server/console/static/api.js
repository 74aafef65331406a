// Asks the server's administration. The token is in this module's memory and nowhere else: a page
// that is closed or loaded again has forgotten it.

const ROOT = new URL('../v1/admin/', import.meta.url);
let token = null;

export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function signIn(given) {
  token = given;
}

export function signOut() {
  token = null;
}

export function isSignedIn() {
  return token !== null;
}

// `path` is a list of parts, each of which may be any text; `query` leaves out what is empty.
export async function ask(method, path, { query = {}, body, signal } = {}) {
  const url = new URL(path.map(encodeURIComponent).join('/'), ROOT);
  for (const [name, value] of Object.entries(query)) {
    if (value !== '' && value !== undefined && value !== null) url.searchParams.set(name, value);
  }
  const headers = {};
  if (token) headers.authorization = `Bearer ${token}`;
  if (method !== 'GET') headers['content-type'] = 'application/json';
  const sent = { method, headers, signal, cache: 'no-store', credentials: 'omit', redirect: 'error' };
  if (method !== 'GET') sent.body = JSON.stringify(body ?? {});
  let response;
  try {
    response = await fetch(url, sent);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(0, 'no_answer', 'The server does not answer.');
  }
  return read(response);
}

async function read(response) {
  let answer = null;
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === 'AbortError') throw error;
  }
  if (response.ok && answer !== null) return answer;
  const said = answer && typeof answer.message === 'string' ? answer.message : null;
  const code = answer && typeof answer.code === 'string' ? answer.code : `http_${response.status}`;
  throw new ApiError(response.status, code, said ?? `The server answered ${response.status}.`);
}
