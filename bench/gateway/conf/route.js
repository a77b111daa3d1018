// gateway.lua in njs, for the comparison only. FLEET: names, states, keys (sha256 -> tenant, or {}).
import crypto from 'crypto';

function refuse(r, status, code, message) {
    const error = {message: message, type: 'invalid_request_error', code: code};
    r.headersOut['Content-Type'] = 'application/json';
    r.return(status, JSON.stringify({error: error}));
}

function tenant(r) {
    const key = (r.headersIn.Authorization || '').slice('Bearer '.length);
    return FLEET.keys[crypto.createHash('sha256').update(key).digest('hex')] || '';
}

function parsed(r) {
    try {
        return JSON.parse(r.requestText);
    } catch (e) {
        return undefined;
    }
}

function route(r) {
    if (Object.keys(FLEET.keys).length && !r.variables.fleet_tenant) {
        return refuse(r, 401, 'invalid_api_key', 'No such key.');
    }
    if (r.method !== 'POST') {
        return refuse(r, 405, 'method_not_allowed', 'Use POST here.');
    }
    const body = parsed(r);
    if (body === undefined) {
        return refuse(r, 400, 'invalid_json', 'The request body is not JSON.');
    }
    if (body === null || typeof body.model !== 'string' || !body.model) {
        return refuse(r, 400, 'model_required', 'The request body must name a model.');
    }
    const model = FLEET.names[body.model];
    if (!model) {
        return refuse(r, 404, 'model_not_found', 'No such model; GET /v1/models lists them.');
    }
    if (FLEET.states[model] !== 'ready') {
        r.headersOut['Retry-After'] = '10';
        return refuse(r, 503, 'model_not_ready', 'No replica of this model is ready; try again.');
    }
    r.variables.fleet_upstream = model;
    r.internalRedirect('@replicas');
}

export default {tenant, route};
