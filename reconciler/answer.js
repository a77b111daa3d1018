import fs from 'fs';

// Looks at a replica's answer on its way to the client and leaves for the access log: when its first
// byte came, how it ended, and its tokens. What passes stays as it is, byte for byte, but for one
// event of a stream: where gateway.js asked for the tokens and the client did not, the event that
// tells them is taken out, as some clients fail on its empty `choices`.
//
// njs frees nothing before a request has ended, so a chunk of a stream must cost no memory of its
// own: an engine's event comes whole, nearly always, and most hold none of the marks.
//
// The marks can't be forged by what a model writes: in a JSON text its quotes have a backslash.
const FINISH = '"finish_reason":"';
const USAGE = '"usage":{';
const FAILED = 'data: {"error"';
const NO_CHOICES = '"choices":[]';
// Of a reason or usage, and of an event that says either.
const LONGEST = 512;
const LONGEST_EVENT = 16384;
const NOTHING = Buffer.alloc(0);

// Of the request that passes now; an engine that keeps contexts has others pass before it.
let request = null;
let stream;
let hides;
let begun;
let held;
let pieces;

function begin(r) {
    request = r;
    stream = (r.headersOut['Content-Type'] || '').startsWith('text/event-stream');
    hides = stream && r.variables.fleet_asking !== '';
    begun = false;
    held = NOTHING;
    pieces = 0;
    // Until its last byte has come; what was seen of its end by then says more.
    r.variables.fleet_end = 'cut';
}

function watch(r, data, flags) {
    if (request !== r) {
        begin(r);
    }
    if (data.length) {
        pieces++;
    }
    if (!begun && data.length) {
        begun = true;
        r.variables.fleet_first_byte = r.variables.request_time;
    }
    if (hides) {
        events(r, data, flags);
    } else {
        r.sendBuffer(data, flags);
        search(r, data);
    }
    if (flags.last && r.variables.fleet_end === 'cut') {
        r.variables.fleet_end = 'whole';
    }
}

// Reason and usage may stand anywhere in an answer or event: what follows them, such as the prompt's
// own tokens, is as long as the caller wants it. The seam is for what stands across two chunks.
function search(r, data) {
    const seam = held.length ? Buffer.concat([held, data.slice(0, LONGEST)]) : NOTHING;
    notice(r, seam);
    notice(r, data);
    const known = seam.length && data.length < LONGEST ? seam : data;
    held = stream && isEnded(data) ? NOTHING : known.slice(Math.max(0, known.length - LONGEST));
}

function notice(r, bytes) {
    if (bytes.indexOf(USAGE) >= 0 || bytes.indexOf(FINISH) >= 0 || bytes.indexOf(FAILED) >= 0) {
        note(r, bytes);
    }
}

function isEnded(events) {
    const length = events.length;
    return length > 1 && events[length - 1] === 10 && events[length - 2] === 10;
}

// An event that is hidden would be missing from the length that a stream may have told.
function lengthless(r) {
    if (r.variables.fleet_asking !== '') {
        delete r.headersOut['Content-Length'];
    }
}

// A client can't use half an event, so one that is to be hidden may wait for its other half.
function events(r, data, flags) {
    let whole = held.length ? Buffer.concat([held, data]) : data;
    held = NOTHING;
    if (!flags.last && !isEnded(whole)) {
        const end = whole.lastIndexOf('\n\n') + 1;
        const begins = end ? end + 1 : 0;
        if (whole.length - begins <= LONGEST_EVENT) {
            held = whole.slice(begins);
            whole = whole.slice(0, begins);
        }
    }
    notice(r, whole);
    r.sendBuffer(whole.indexOf(USAGE) >= 0 ? without(whole) : whole, flags);
}

function without(whole) {
    const kept = [];
    for (let from = 0, to; from < whole.length; from = to) {
        const end = whole.indexOf('\n\n', from);
        to = end < 0 ? whole.length : end + 2;
        const event = whole.slice(from, to);
        if (event.indexOf(NO_CHOICES) < 0 || event.indexOf(USAGE) < 0) {
            kept.push(event);
        }
    }
    return Buffer.concat(kept);
}

function note(r, bytes) {
    for (let at = bytes.indexOf(FINISH); at >= 0; at = bytes.indexOf(FINISH, at + 1)) {
        const reason = bytes.slice(at + FINISH.length, at + FINISH.length + 32).toString();
        end(r, reason.slice(0, reason.indexOf('"')));
    }
    if (stream && bytes.indexOf(FAILED) >= 0) {
        end(r, 'error');
    }
    const begins = bytes.lastIndexOf(USAGE);
    if (begins < 0) {
        return;
    }
    const usage = bytes.slice(begins, begins + 450).toString();
    const prompt = usage.match(/"(?:prompt|input)_tokens":(\d+)/);
    if (prompt) {
        const completion = usage.match(/"(?:completion|output)_tokens":(\d+)/);
        r.variables.fleet_prompt_tokens = prompt[1];
        // An embedding has none.
        r.variables.fleet_completion_tokens = completion ? completion[1] : '0';
    }
}

// Of several choices the one that failed tells how it was.
function end(r, reason) {
    const known = r.variables.fleet_end;
    if (known !== 'abort' && known !== 'error') {
        r.variables.fleet_end = reason;
    }
}

// How many pieces of a stream have passed: about its tokens, where its client left before the end.
function passed(r) {
    return request === r && stream ? String(pieces) : '0';
}

// NGINX ends idle connections at a reload, although a request may be on its way on one. So for a
// moment before, and for as long as an old worker lives, each answer asks the client to end its own; a
// stream always does, as it says so long before it ends. HTTP/2 has frames for that, and forbids the
// header.
function connection(r) {
    if (r.httpVersion >= '2') {
        return '';
    }
    if ((r.headersOut['Content-Type'] || '').startsWith('text/event-stream')) {
        return 'close';
    }
    try {
        return fs.statSync(r.variables.fleet_closing, {throwIfNoEntry: false}) ? 'close' : '';
    } catch (e) {
        return ''; // the folder is closed to NGINX's workers
    }
}

export default {watch, lengthless, passed, connection};
