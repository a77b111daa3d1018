// Sends a request to the upstream of the model that its JSON body, or its path, names. FLEET,
// which NGINX reads once from the fleet.json of reconciler/routes.py, can't change, and its arrays
// lack all methods:
//   fleet      its name
//   names      what a client may call a model -> the model's own name
//   listed     these names, in the spec's order
//   states     the model's own name -> ready, starting or stopped
//   open       the own name of a model that is ready -> which share of its replicas is without TLS
//   canaries   the own name of a model whose canary is tried -> its share (percent), its revision,
//              and open; both it and the rest of the model have replicas
//   affinity   a model's own name -> `tenant`, or the header whose equal values stay together
//   external   a model's own name -> url (without its scheme) and model of its fallback
//   keys       the sha256 of a key -> the name of its tenant; null: open to everyone
//   tenants    the name of a tenant -> what it may: models, their own names or null for all, and
//              which of the limits in gateway.conf, rate and concurrency, are its own
//   exhausted  the tenants that have used up their tokens of this day (UTC)
import crypto from 'crypto';

// What vLLM 0.32 serves to callers. Whatever is not named here never reaches a replica: paths
// that load adapters, put the engine to sleep or show its inside.
const JSON_PATHS = [
    '/v1/chat/completions', '/v1/completions', '/v1/responses', '/v1/embeddings',
    '/v1/messages', '/v1/messages/count_tokens', '/tokenize', '/detokenize',
    '/v1/score', '/score', '/v1/rerank', '/v2/rerank', '/rerank', '/classify', '/pooling',
];
const COMPLETION_PATHS = ['/v1/chat/completions', '/v1/completions'];
// What any API like OpenAI's has.
const EXTERNAL_PATHS = COMPLETION_PATHS.concat('/v1/responses', '/v1/embeddings');
const UPLOAD_PATHS = ['/v1/audio/transcriptions', '/v1/audio/translations'];
const RESPONSE_PATH = /^\/v1\/responses\/[A-Za-z0-9_-]+$/;
const CANCEL_PATH = /^\/v1\/responses\/[A-Za-z0-9_-]+\/cancel$/;
const BEARER = /^bearer +([^ ]+) *$/i;
const BY_PATH = /^\/m\/([a-z0-9-]+)(\/.*)$/;

// Seconds after which a model's first replica may be ready: two retries, which is what OpenAI's
// clients do by themselves, carry a caller through a cold start of twice as long.
const RETRY_AFTER_S = {starting: 15, stopped: 30};
const DAY_S = 86400;
// A body of more bytes is searched by NGINX before (@long).
const LONG = 16384;
// Keys, lists and objects in a body. njs takes 200 bytes for an empty list, and the square of their
// number in time for keys of one hash: 20,000 of those hold up a worker for a second or two, 300,000
// for minutes. What is smaller can't hold many.
const MOST_PARTS = 20000;
const SMALL = 100000;

function own(object, key) {
    return Object.prototype.hasOwnProperty.call(object, key);
}

function among(array, item) {
    return Array.prototype.includes.call(array, item);
}

// Bytes that are no UTF-8 match nothing; a pattern alone would throw at them.
function matched(pattern, text) {
    try {
        return pattern.exec(text);
    } catch (e) {
        return null;
    }
}

function failed(r, status, type, code, message, param) {
    r.variables.fleet_code = code;
    r.headersOut['Content-Type'] = 'application/json';
    const error = {message: message, type: type, param: param || null, code: code};
    r.return(status, JSON.stringify({error: error}));
}

function refused(r, status, code, message, param) {
    failed(r, status, 'invalid_request_error', code, message, param);
}

function unknownPath(r) {
    refused(r, 404, 'unknown_url', 'No such path; the OpenAI API is below /v1/.');
}

function wrongMethod(r, right) {
    r.headersOut.Allow = right;
    refused(r, 405, 'method_not_supported', `Use ${right} here.`);
}

// Who calls: '' for nobody known, and for everyone where there are no tenants. Leaves the caller's
// limits too, for NGINX to count by.
function tenant(r) {
    if (FLEET.keys === null) {
        return '';
    }
    const sent = r.headersIn;
    const bearer = matched(BEARER, sent.Authorization || '');
    const key = bearer ? bearer[1] : sent['api-key'] || sent['x-api-key'];
    if (!key) {
        return '';
    }
    const hash = crypto.createHash('sha256').update(key).digest('hex');
    if (!own(FLEET.keys, hash)) {
        return '';
    }
    const name = FLEET.keys[hash];
    const limits = FLEET.tenants[name];
    r.variables.fleet_rate = limits.rate || '';
    r.variables.fleet_concurrency = limits.concurrency || '';
    return name;
}

function mayUse(r, model) {
    if (FLEET.keys === null) {
        return true;
    }
    const models = (FLEET.tenants[r.variables.fleet_tenant] || {models: []}).models;
    return models === null || among(models, model);
}

// Passes a request on to the replicas of a model; every way to one goes through here. `body` is
// the request as an object, undefined where it is none that was read.
function send(r, model, path, body) {
    if (!mayUse(r, model)) {
        return refused(r, 403, 'model_not_found', 'This key may not use that model.', 'model');
    }
    if (among(FLEET.exhausted, r.variables.fleet_tenant)) {
        // Until the next day begins, so nothing retries before.
        r.headersOut['Retry-After'] = String(DAY_S - Math.floor(Date.now() / 1000) % DAY_S);
        r.headersOut['X-Should-Retry'] = 'false';
        const message = 'The tokens of this day are used up; the next day begins at 00:00 UTC.';
        return failed(r, 429, 'insufficient_quota', 'insufficient_quota', message);
    }
    r.variables.fleet_model = model;
    const state = FLEET.states[model];
    if (state !== 'ready') {
        if (own(FLEET.external, model) && EXTERNAL_PATHS.includes(path) && isObject(body)) {
            return sendAway(r, model, path, body);
        }
        r.headersOut['Retry-After'] = String(RETRY_AFTER_S[state]);
        const message = 'No replica of this model is ready; try again.';
        return failed(r, 503, 'server_error', 'model_not_ready', message);
    }
    r.variables.fleet_upstream = upstream(r, model);
    r.variables.fleet_path = path;
    if (!mustAskForUsage(path, body)) {
        return r.internalRedirect('@replicas');
    }
    const text = r.requestText;
    // Of two keys of one name the last one holds.
    const asking = ',"stream_options":{"include_usage":true}}';
    r.variables.fleet_asking = text.slice(0, text.lastIndexOf('}')) + asking;
    r.internalRedirect('@asking');
}

// Which replicas of a model that is ready get this request.
function upstream(r, model) {
    const common = affinity(r, model);
    if (own(FLEET.canaries, model)) {
        const canary = FLEET.canaries[model];
        const tried = drawn(common) * 100 < canary.share;
        r.variables.fleet_trial = `${tried ? 'canary' : 'rest'}.${canary.revision}`;
        if (tried) {
            return `${kind(canary.open)}.${model}.canary`;
        }
    }
    r.variables.fleet_affinity = common;
    return `${kind(FLEET.open[model])}.${model}${common ? '.sticky' : ''}`;
}

// With TLS or without; `open` is the share of the replicas that have none.
function kind(open) {
    return open === 1 || (open && Math.random() < open) ? 'open' : 'model';
}

// What this request has in common with those that belong to the same replica; '': with none.
function affinity(r, model) {
    if (!own(FLEET.affinity, model)) {
        return '';
    }
    const by = FLEET.affinity[model];
    return by === 'tenant' ? r.variables.fleet_tenant : r.headersIn[by] || '';
}

// From 0 to 1, by chance; for equal words the same: a session does not change sides.
function drawn(word) {
    if (!word) {
        return Math.random();
    }
    const digest = crypto.createHash('sha256').update(word).digest('hex');
    return parseInt(digest.slice(0, 8), 16) / 0x100000000;
}

function isObject(body) {
    return typeof body === 'object' && body !== null && !Array.isArray(body);
}

// Asks a model's fallback, by the name that the model has there.
function sendAway(r, model, path, body) {
    const away = FLEET.external[model];
    if (mustAskForUsage(path, body)) {
        r.variables.fleet_asking = 'yes';
        body.stream_options = Object.assign({}, body.stream_options, {include_usage: true});
    }
    body.model = away.model;
    r.variables.fleet_body = JSON.stringify(body);
    r.variables.fleet_upstream = `external.${model}`;
    r.variables.fleet_external = away.url;
    r.variables.fleet_path = path.slice('/v1'.length);
    r.internalRedirect('@external');
}

// A stream tells its tokens only if it is asked to, so it is asked; docs/decisions/0010. The event
// that tells them is hidden from a client that did not ask itself (answer.js).
function mustAskForUsage(path, body) {
    if (!body || !body.stream || !COMPLETION_PATHS.includes(path) || !isTrue(body.stream)) {
        return false;
    }
    const options = body.stream_options === undefined ? null : body.stream_options;
    return typeof options === 'object' && !(options && isTrue(options.include_usage));
}

// As the engine reads what should be true or false.
function isTrue(value) {
    return /^(true|t|yes|y|on|1)$/i.test(String(value));
}

// The bytes of the request's body; undefined if it was refused.
function received(r) {
    try {
        return r.requestBuffer || '';
    } catch (e) {
        // So many chunks that the body no longer fits its buffer.
        r.return(413);
    }
}

// The request's body, whatever its JSON stands for; undefined if it was refused.
function read(r) {
    const sent = received(r);
    if (sent === undefined) {
        return;
    }
    if (sent.length > SMALL && hasTooManyParts(sent)) {
        return refused(r, 400, 'invalid_json', 'The request body has too many parts.');
    }
    try {
        return JSON.parse(strictly(r));
    } catch (e) {
        const deep = String(e).includes('too deep');
        const what = deep ? 'is nested too deeply' : 'is not JSON';
        return refused(r, 400, 'invalid_json', `The request body ${what}.`);
    }
}

// The body as text. No byte is replaced by a character that an engine would not read there, as
// `requestText` does; what is all ASCII needs no such care, which costs more than all else here.
function strictly(r) {
    const text = r.requestText;
    if (/[^\x00-\x7f]/.test(text)) {
        return new TextDecoder('utf-8', {fatal: true}).decode(r.requestBuffer);
    }
    return text;
}

function hasTooManyParts(bytes) {
    // Nearly all have fewer even with those in their texts, and are not looked at string by string.
    if (countMarks(bytes) <= MOST_PARTS) {
        return false;
    }
    let parts = 0;
    for (let at = 0; at < bytes.length;) {
        const quote = bytes.indexOf('"', at);
        const end = quote < 0 ? bytes.length : quote;
        // A string counts a little: to look behind it takes memory too.
        parts += 0.1 + countMarks(bytes.slice(at, end));
        if (parts > MOST_PARTS) {
            return true;
        }
        at = quote < 0 ? end : behindString(bytes, quote + 1);
    }
    return false;
}

function countMarks(bytes) {
    return countOf(bytes, ':') + countOf(bytes, '[') + countOf(bytes, '{');
}

function countOf(bytes, mark) {
    let count = 0;
    for (let at = bytes.indexOf(mark); at >= 0 && count <= MOST_PARTS; count++) {
        at = bytes.indexOf(mark, at + 1);
    }
    return count;
}

// Where a string ends that begins at `from`: behind the first quote that has no backslash of its own.
function behindString(bytes, from) {
    for (let quote; (quote = bytes.indexOf('"', from)) >= 0; from = quote + 1) {
        let slashes = 0;
        while (quote - slashes > from && bytes[quote - slashes - 1] === 92) {
            slashes++;
        }
        if (slashes % 2 === 0) {
            return quote + 1;
        }
    }
    return bytes.length;
}

function route(r) {
    if (UPLOAD_PATHS.includes(r.uri)) {
        const message = `This path has no JSON body: use /m/MODEL${r.uri}.`;
        return refused(r, 404, 'unknown_url', message);
    }
    if (!JSON_PATHS.includes(r.uri)) {
        return unknownPath(r);
    }
    if (r.method !== 'POST') {
        return wrongMethod(r, 'POST');
    }
    const sent = received(r);
    if (sent === undefined) {
        return;
    }
    if (sent.length > LONG) {
        return r.internalRedirect('@long');
    }
    routeByBody(r);
}

function routeByBody(r) {
    const body = read(r);
    if (body === undefined) {
        return;
    }
    if (body === null || typeof body.model !== 'string' || !body.model) {
        return refused(r, 400, 'model_required', 'The request body must name a model.', 'model');
    }
    routeByName(r, body.model, body);
}

// A long body of which NGINX has found that it names one model and asks for no stream: what else
// stands there the engine will see.
function routeLong(r) {
    const name = r.variables.fleet_word;
    // A fallback knows it by another name, which must then stand in its place.
    if (!name || (own(FLEET.names, name) && own(FLEET.external, FLEET.names[name]))) {
        return routeByBody(r);
    }
    routeByName(r, name);
}

function routeByName(r, name, body) {
    if (!own(FLEET.names, name)) {
        const message = 'No such model; GET /v1/models lists them.';
        return refused(r, 404, 'model_not_found', message, 'model');
    }
    send(r, FLEET.names[name], r.uri, body);
}

// /m/MODEL/v1/...: for bodies that are not JSON, and for what has none.
function routeByPath(r) {
    const parts = matched(BY_PATH, r.uri);
    if (!parts) {
        return unknownPath(r);
    }
    const path = parts[2];
    const right = matched(RESPONSE_PATH, path) ? 'GET' : 'POST';
    if (right === 'POST' && !matched(CANCEL_PATH, path)
        && !JSON_PATHS.includes(path) && !UPLOAD_PATHS.includes(path)) {
        return unknownPath(r);
    }
    if (r.method !== right) {
        return wrongMethod(r, right);
    }
    if (!own(FLEET.states, parts[1])) {
        return refused(r, 404, 'model_not_found', 'No such model; GET /v1/models lists them.');
    }
    if (!COMPLETION_PATHS.includes(path)) {
        return send(r, parts[1], path, own(FLEET.external, parts[1]) ? leniently(r) : undefined);
    }
    // Read all the same, or its tokens would not be asked for.
    const body = read(r);
    if (body !== undefined) {
        send(r, parts[1], path, body);
    }
}

// The body for a fallback, which knows the model by another name; undefined if it has none to tell.
function leniently(r) {
    try {
        return JSON.parse(r.requestText);
    } catch (e) {
        // Not JSON, or so large that it lies in a file: the engine will see.
    }
}

function entry(name) {
    const state = FLEET.states[FLEET.names[name]];
    return {id: name, object: 'model', created: 0, owned_by: FLEET.fleet, state: state};
}

// GET /v1/models and /v1/models/NAME: what this tenant may use, and whether it can be used now.
function models(r) {
    if (r.method !== 'GET' && r.method !== 'HEAD') {
        return wrongMethod(r, 'GET');
    }
    const names = Array.prototype.filter.call(
        FLEET.listed, name => mayUse(r, FLEET.names[name]));
    r.headersOut['Content-Type'] = 'application/json';
    if (r.uri === '/v1/models') {
        return r.return(200, JSON.stringify({object: 'list', data: names.map(entry)}));
    }
    const name = r.uri.slice('/v1/models/'.length);
    if (r.uri[10] !== '/' || !names.includes(name)) {
        return refused(r, 404, 'model_not_found', 'No such model; GET /v1/models lists them.');
    }
    r.return(200, JSON.stringify(entry(name)));
}

export default {tenant, route, routeLong, routeByBody, routeByPath, models};
