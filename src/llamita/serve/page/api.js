/** The server's interface: JSON requests, streams of server-sent events, and one kind of error for all that fails. */

const KEY = "llamita-key"; // in sessionStorage: it goes when the tab is closed

/** What a request failed with. `status` is 0 if the server was not reached. */
export class ApiError extends Error {
  /** @param {string} message @param {number} status @param {string | null} code @param {number} [retryAfter] seconds */
  constructor(message, status, code, retryAfter) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  /** What the user can do about it, "" if the message says it all. */
  get hint() {
    if (this.status === 0) return "Check that the server is running, then try again.";
    if (this.code === "context_length_exceeded")
      return "Shorten the message, edit an earlier one, or begin a new chat.";
    if (this.status === 429 || this.status === 503)
      return this.retryAfter ? `Try again in ${this.retryAfter} seconds.` : "Try again in a moment.";
    if (this.status >= 500) return "The server's log says more.";
    return "";
  }
}

/** @type {(refused: boolean) => Promise<string | null>} */
let askForKey = async () => null;
/** @type {Promise<string | null> | null} */
let asking = null; // requests that fail together ask once

/** Say how the user is asked for the key. @param {(refused: boolean) => Promise<string | null>} ask null: gave up */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/**
 * Send a request; with a key that the user gives, again, if the server wants one.
 * @param {string} path
 * @param {object} [body] is posted
 * @param {AbortSignal} [signal]
 * @param {boolean} [asks] for the key
 * @returns {Promise<Response>} whose status is 200
 */
async function send(path, body, signal, asks = true) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    /** @type {Record<string, string>} */
    const headers = body ? { "Content-Type": "application/json" } : {};
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await reach(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || !asks) throw error;
    if (key === sessionStorage.getItem(KEY)) {
      asking ??= askForKey(key !== null).finally(() => (asking = null));
      const given = await asking;
      if (given === null) throw error;
      sessionStorage.setItem(KEY, given);
    }
  }
}

/** @param {string} path @param {RequestInit} options */
async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.", 0, null);
  }
}

/** Read OpenAI's form of an error, or make one. @param {Response} response */
async function errorOf(response) {
  const retry = Number(response.headers.get("Retry-After")) || undefined;
  const body = await response.json().catch(() => ({}));
  const { message, code } = body.error ?? {};
  return new ApiError(
    message ?? `The server answered with status ${response.status}.`,
    response.status,
    code ?? null,
    retry,
  );
}

/**
 * Get or post JSON.
 * @param {string} path
 * @param {object} [body]
 * @param {AbortSignal} [signal]
 * @returns {Promise<any>}
 */
export async function json(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/** Get or post JSON for something that is only looked at: it does not ask for the key. @type {typeof json} */
export async function quietJson(path, body, signal) {
  return (await send(path, body, signal, false)).json();
}

/**
 * Post and yield the JSON of each event until [DONE]. An abort closes the connection; that stops the server.
 * @param {string} path
 * @param {object} body
 * @param {AbortSignal} signal
 */
export async function* events(path, body, signal) {
  const response = await send(path, body, signal);
  for await (const data of eventData(response, signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message ?? "The server broke off.", 500, event.error.code ?? null);
    yield event;
  }
  throw new ApiError("The connection ended before the answer did.", 0, null);
}

/**
 * Yield what stands behind `data:`, event by event; comments and other fields are left out.
 * @param {Response} response
 * @param {AbortSignal} signal
 */
async function* eventData(response, signal) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  /** @type {string[]} */
  let data = [];
  try {
    for (;;) {
      const { value, done } = await readOf(reader, signal);
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a CR at the very end may be half of CR LF
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // also when the caller leaves its loop early
  }
}

/** @param {ReadableStreamDefaultReader<Uint8Array>} reader @param {AbortSignal} signal */
async function readOf(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ApiError("The connection to the server broke.", 0, null);
  }
}
