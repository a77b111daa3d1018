// A request of a second, or a stream whose first event comes at once and whose last comes later.
const SECOND_MS = 1000;
const GAP_MS = 5;
const EVENTS = 3;
const TEXT = {id: 'bench', object: 'text_completion', model: 'tiny'};

function event(text) {
    return `data: ${text}\n\n`;
}

function answer(r) {
    if (JSON.parse(r.requestText).stream) {
        return stream(r);
    }
    setTimeout(() => r.return(200, JSON.stringify(TEXT)), SECOND_MS);
}

function stream(r) {
    let sent = 0;
    function next() {
        r.send(event(JSON.stringify(TEXT)));
        sent += 1;
        if (sent < EVENTS) {
            return setTimeout(next, GAP_MS);
        }
        r.send(event('[DONE]'));
        r.finish();
    }
    r.headersOut['Content-Type'] = 'text/event-stream';
    r.status = 200;
    r.sendHeader();
    next();
}

export default {answer};
