// Sends a request to the upstream of the model that its JSON body names. FLEET, which
// reconciler/routes.py writes above these lines, is:
//   fleet   its name
//   names   what a client may call a model -> the model's own name
//   listed  these names, in the spec's order
//   states  the model's own name -> ready, starting or stopped
//   exhausted  tenants whose tokens of the day are spent
function error(r, status, code, message) {
    r.variables.fleet_error = code;
    r.headersOut['Content-Type'] = 'application/json';
    const body = {message: message, type: 'invalid_request_error', code: code};
    r.return(status, JSON.stringify({error: body}));
}

function notFound(r) {
    error(r, 404, 'not_found', 'No such path; the OpenAI API is below /v1/.');
}

function route(r) {
    if (r.method !== 'POST') {
        return error(r, 405, 'method_not_allowed', 'Use POST here.');
    }
    let body;
    try {
        body = JSON.parse(r.requestText);
    } catch (e) {
        return error(r, 400, 'invalid_json', 'The request body is not JSON.');
    }
    if (body === null || typeof body.model !== 'string' || !body.model) {
        return error(r, 400, 'model_required', 'The request body must name a model.');
    }
    if (!Object.prototype.hasOwnProperty.call(FLEET.names, body.model)) {
        return error(r, 404, 'model_not_found', 'No such model; GET /v1/models lists them.');
    }
    if (FLEET.exhausted.includes(r.variables.fleet_tenant)) {
        return error(r, 429, 'insufficient_quota', 'The tokens of this UTC day are spent.');
    }
    const model = FLEET.names[body.model];
    r.variables.fleet_model = model;
    if (FLEET.states[model] !== 'ready') {
        r.headersOut['Retry-After'] = '10';
        return error(r, 503, 'model_not_ready', 'No replica of this model is ready; try again.');
    }
    askForUsage(r, body);
    r.variables.fleet_upstream = `model.${model}`;
    r.internalRedirect('@replicas');
}

// A stream tells its tokens only if it is asked to, so it is asked; docs/decisions/0010. The event
// that tells them is hidden from a client that did not ask itself (answer.js).
function askForUsage(r, body) {
    const options = body.stream_options === undefined ? null : body.stream_options;
    const ours = /^\/v1\/(chat\/)?completions$/.test(r.uri) && isTrue(body.stream);
    if (!ours || typeof options !== 'object' || (options && isTrue(options.include_usage))) {
        return;
    }
    const text = r.requestText;
    // Of two keys of one name the last one holds.
    const asking = ',"stream_options":{"include_usage":true}}';
    r.variables.fleet_asking = text.slice(0, text.lastIndexOf('}')) + asking;
}

// As the engine reads what should be true or false.
function isTrue(value) {
    return /^(true|t|yes|y|on|1)$/i.test(String(value));
}

function models(r) {
    const data = FLEET.listed.map(name => ({
        id: name, object: 'model', owned_by: FLEET.fleet, state: FLEET.states[FLEET.names[name]],
    }));
    r.headersOut['Content-Type'] = 'application/json';
    r.return(200, JSON.stringify({object: 'list', data: data}));
}

export default {route, models, notFound};
