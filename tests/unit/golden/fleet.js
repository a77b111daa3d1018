// Sends a request to the upstream of the model that its JSON body names. FLEET, which NGINX reads
// once from the fleet.json of reconciler/routes.py, can't change, and its arrays lack all methods:
//   fleet   its name
//   names   what a client may call a model -> the model's own name
//   listed  these names, in the spec's order
//   states  the model's own name -> ready, starting or stopped

// To read a body of 256 KiB takes ten times as long as to pass it on; up to here it makes no odds.
const SHORT_BYTES = 4096;

function error(r, status, code, message) {
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
    if (r.requestBuffer && r.requestBuffer.length > SHORT_BYTES) {
        return r.internalRedirect('@long');
    }
    routeWhole(r);
}

// What NGINX has found in a long body; one in which it did not is read whole.
function routeLong(r) {
    const name = r.variables.fleet_named;
    return name ? routeTo(r, name) : routeWhole(r);
}

function routeWhole(r) {
    let body;
    try {
        body = JSON.parse(r.requestText);
    } catch (e) {
        return error(r, 400, 'invalid_json', 'The request body is not JSON.');
    }
    if (body === null || typeof body.model !== 'string' || !body.model) {
        return error(r, 400, 'model_required', 'The request body must name a model.');
    }
    routeTo(r, body.model);
}

function routeTo(r, name) {
    if (!Object.prototype.hasOwnProperty.call(FLEET.names, name)) {
        return error(r, 404, 'model_not_found', 'No such model; GET /v1/models lists them.');
    }
    const model = FLEET.names[name];
    r.variables.fleet_model = model;
    if (FLEET.states[model] !== 'ready') {
        r.headersOut['Retry-After'] = '10';
        return error(r, 503, 'model_not_ready', 'No replica of this model is ready; try again.');
    }
    r.variables.fleet_upstream = `model.${model}`;
    r.internalRedirect('@replicas');
}

function models(r) {
    const data = Array.prototype.map.call(FLEET.listed, name => ({
        id: name, object: 'model', owned_by: FLEET.fleet, state: FLEET.states[FLEET.names[name]],
    }));
    r.headersOut['Content-Type'] = 'application/json';
    r.return(200, JSON.stringify({object: 'list', data: data}));
}

export default {route, routeLong, models, notFound};
