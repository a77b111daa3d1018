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
// The end of a whole answer, where reason and usage are; and no event that says either is longer.
const TAIL = 2048;
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
    if (stream) {
        events(r, data, flags);
    } else {
        r.sendBuffer(data, flags);
        held = tail(data);
    }
    if (flags.last) {
        if (!stream) {
            note(r, held);
        }
        if (r.variables.fleet_end === 'cut') {
            r.variables.fleet_end = 'whole';
        }
    }
}

// An event that is hidden would be missing from the length that a stream may have told.
function lengthless(r) {
    if (r.variables.fleet_asking !== '') {
        delete r.headersOut['Content-Length'];
    }
}

function tail(data) {
    const bytes = data.length < TAIL && held.length ? Buffer.concat([held, data]) : data;
    return bytes.length > TAIL ? bytes.slice(bytes.length - TAIL) : bytes;
}

// A client can't use half an event, so one that is to be hidden may wait for its other half.
function events(r, data, flags) {
    if (!hides) {
        r.sendBuffer(data, flags);
    }
    let whole = held.length ? Buffer.concat([held, data]) : data;
    held = NOTHING;
    const length = whole.length;
    if (!flags.last && !(length > 1 && whole[length - 1] === 10 && whole[length - 2] === 10)) {
        const end = whole.lastIndexOf('\n\n') + 1;
        const begins = end ? end + 1 : 0;
        if (length - begins <= LONGEST_EVENT) {
            held = whole.slice(begins);
            whole = whole.slice(0, begins);
        }
    }
    const tells = whole.indexOf(USAGE) >= 0;
    if (tells || whole.indexOf(FINISH) >= 0 || whole.indexOf(FAILED) >= 0) {
        note(r, whole);
    }
    if (hides) {
        r.sendBuffer(tells ? without(whole) : whole, flags);
    }
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
    const text = bytes.toString();
    const reasons = text.match(/"finish_reason":"\w+"/g) || [];
    reasons.forEach(reason => end(r, reason.slice(FINISH.length, -1)));
    if (stream && bytes.indexOf(FAILED) >= 0) {
        end(r, 'error');
    }
    const usage = text.slice(text.lastIndexOf(USAGE));
    const prompt = usage.match(/^[\s\S]{0,400}?"(?:prompt|input)_tokens":(\d+)/);
    const completion = usage.match(/^[\s\S]{0,400}?"(?:completion|output)_tokens":(\d+)/);
    if (prompt) {
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

export default {watch, lengthless, passed};
