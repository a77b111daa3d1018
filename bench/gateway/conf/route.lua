-- gateway.js in Lua, for the comparison only. FLEET: names, states, keys (sha256 -> tenant, or {}).
local cjson = require("cjson.safe")
local ffi = require("ffi")

ffi.cdef("unsigned char *SHA256(const unsigned char *data, size_t length, unsigned char *digest);")
local digest = ffi.new("unsigned char[32]")

local function sha256(text)
    ffi.C.SHA256(text, #text, digest)
    return (ffi.string(digest, 32):gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

local function refuse(status, code, message)
    ngx.status = status
    ngx.header["Content-Type"] = "application/json"
    local body = {message = message, type = "invalid_request_error", code = code}
    ngx.print(cjson.encode({error = body}))
    return ngx.exit(ngx.HTTP_OK)
end

return function()
    if next(FLEET.keys) then
        local key = (ngx.var.http_authorization or ""):match("^Bearer (.+)$")
        local tenant = key and FLEET.keys[sha256(key)]
        if not tenant then
            return refuse(401, "invalid_api_key", "No such key.")
        end
        ngx.var.fleet_tenant = tenant
    end
    if ngx.req.get_method() ~= "POST" then
        return refuse(405, "method_not_allowed", "Use POST here.")
    end
    ngx.req.read_body()
    local body = cjson.decode(ngx.req.get_body_data() or "")
    if body == nil then
        return refuse(400, "invalid_json", "The request body is not JSON.")
    end
    local name = type(body) == "table" and body.model
    if type(name) ~= "string" or name == "" then
        return refuse(400, "model_required", "The request body must name a model.")
    end
    local model = FLEET.names[name]
    if not model then
        return refuse(404, "model_not_found", "No such model; GET /v1/models lists them.")
    end
    if FLEET.states[model] ~= "ready" then
        ngx.header["Retry-After"] = "10"
        return refuse(503, "model_not_ready", "No replica of this model is ready; try again.")
    end
    ngx.var.fleet_upstream = model
end
