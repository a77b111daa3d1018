const UPSTREAMS = JSON.parse("{\"big\": \"model.big\", \"org/Tiny\": \"model.tiny\", \"starting\": null, \"stopped\": null, \"tiny\": \"model.tiny\"}");
const MODELS = "{\"object\": \"list\", \"data\": [{\"id\": \"tiny\", \"object\": \"model\", \"owned_by\": \"demo\", \"state\": \"ready\"}, {\"id\": \"org/Tiny\", \"object\": \"model\", \"owned_by\": \"demo\", \"state\": \"ready\"}, {\"id\": \"big\", \"object\": \"model\", \"owned_by\": \"demo\", \"state\": \"ready\"}, {\"id\": \"starting\", \"object\": \"model\", \"owned_by\": \"demo\", \"state\": \"starting\"}, {\"id\": \"stopped\", \"object\": \"model\", \"owned_by\": \"demo\", \"state\": \"stopped\"}]}";
// Sends a request to the upstream of the model that its JSON body names.
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
    let body;
    try {
        body = JSON.parse(r.requestText);
    } catch (e) {
        return error(r, 400, 'invalid_json', 'The request body is not JSON.');
    }
    if (body === null || typeof body.model !== 'string' || !body.model) {
        return error(r, 400, 'model_required', 'The request body must name a model.');
    }
    if (!Object.prototype.hasOwnProperty.call(UPSTREAMS, body.model)) {
        return error(r, 404, 'model_not_found', 'No such model; GET /v1/models lists them.');
    }
    if (UPSTREAMS[body.model] === null) {
        r.headersOut['Retry-After'] = '10';
        return error(r, 503, 'model_not_ready', 'No replica of this model is ready; try again.');
    }
    r.variables.fleet_upstream = UPSTREAMS[body.model];
    r.internalRedirect('@replicas');
}

function models(r) {
    r.headersOut['Content-Type'] = 'application/json';
    r.return(200, MODELS);
}

export default {route, models, notFound};
