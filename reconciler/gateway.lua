-- Sends a request to the upstream of the model that its JSON body, or its path, names. FLEET,
-- which NGINX reads once from the fleet.json of reconciler/routes.py, is:
--   fleet      its name
--   names      what a client may call a model -> the model's own name
--   listed     these names, in the spec's order
--   states     the model's own name -> ready, starting or stopped
--   open       the own name of a model that is ready -> which share of its replicas is without TLS
--   canaries   the own name of a model whose canary is tried -> its share (percent), its revision,
--              and open; both it and the rest of the model have replicas
--   affinity   a model's own name -> `tenant`, or the header whose equal values stay together
--   external   a model's own name -> url (without its scheme) and model of its fallback
--   keys       the sha256 of a key -> the name of its tenant; null: open to everyone
--   tenants    the name of a tenant -> what it may: models, their own names or null for all, and
--              which of the limits in gateway.conf, rate and concurrency, are its own
--   exhausted  the tenants that have used up their tokens of this day (UTC)
local folder = ...
local ffi = require("ffi")
local base = require("resty.core.base")
local C = ffi.C
local cjson = require("cjson.safe").new()
cjson.decode_invalid_numbers(false)
local null, find, gsub, match, sub = cjson.null, string.find, string.gsub, string.match, string.sub
local ngx, var, re_find = ngx, ngx.var, ngx.re.find

-- A body is garbage as soon as it was looked at. At the usual pace (200) a long one cost a worker more
-- in looks for such than in all else; so its memory may grow to ten times what lives in it, which
-- must then be no huge body.
collectgarbage("setpause", 1000)
local HUGE = 1048576
-- NGINX takes memory for each body and gives it back: to have it from the kernel each time costs as
-- much as to pass the body on. So a worker keeps up to 32 MiB for the next ones, none of a huge body.
ffi.cdef("int mallopt(int param, int value);")
local TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
C.mallopt(TRIM_THRESHOLD, 32 * HUGE)
C.mallopt(MMAP_THRESHOLD, HUGE)

local file = assert(io.open(folder .. "/fleet.json"))
local FLEET = assert(cjson.decode(file:read("*a")))
file:close()

local function set(list)
    local members = {}
    for _, member in ipairs(list) do
        members[member] = true
    end
    return members
end

-- What vLLM 0.32 serves to callers. Whatever is not named here never reaches a replica: paths
-- that load adapters, put the engine to sleep or show its inside.
local JSON_PATHS = set({
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings",
    "/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize",
    "/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank", "/classify", "/pooling",
})
local COMPLETION_PATHS = set({"/v1/chat/completions", "/v1/completions"})
-- What any API like OpenAI's has.
local EXTERNAL_PATHS = set({
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings",
})
local UPLOAD_PATHS = set({"/v1/audio/transcriptions", "/v1/audio/translations"})
local RESPONSE_PATH = "^/v1/responses/[%w_-]+$"
local CANCEL_PATH = "^/v1/responses/[%w_-]+/cancel$"

-- Seconds after which a model's first replica may be ready: two retries, which is what OpenAI's
-- clients do by themselves, carry a caller through a cold start of twice as long.
local RETRY_AFTER_S = {starting = 15, stopped = 30}
local DAY_S = 86400
-- A body of more bytes is not read but looked through: to read 256 KiB takes half a millisecond.
local LONG = 16384
-- Members of an object that is looked through: they cost some 2 us each.
local MOST_MEMBERS = 20000
-- As the engine reads what should be true or false.
local TRUE = set({"true", "t", "yes", "y", "on", "1"})

ffi.cdef("unsigned char *SHA256(const unsigned char *data, size_t length, unsigned char *digest);")
local digest = ffi.new("unsigned char[32]")

-- Of NGINX's own libcrypto: 32 bytes.
local function sha256(text)
    C.SHA256(text, #text, digest)
    return ffi.string(digest, 32)
end

-- As sha256 says them.
local TENANTS = {}
if FLEET.keys ~= null then
    for hash, name in pairs(FLEET.keys) do
        TENANTS[hash:gsub("..", function(pair) return string.char(tonumber(pair, 16)) end)] = name
    end
end
local EXHAUSTED = set(FLEET.exhausted)
-- The models that a tenant may use. Who is not in it may use none; without keys nobody has a name.
local ALL = {}
local ALLOWED = {[""] = FLEET.keys == null and ALL or nil}
for name, tenant in pairs(FLEET.tenants) do
    ALLOWED[name] = tenant.models == null and ALL or set(tenant.models)
end
-- By which variable of NGINX a model's requests stay together.
local AFFINITY = {}
for model, by in pairs(FLEET.affinity) do
    AFFINITY[model] = by == "tenant" and "fleet_tenant" or "http_" .. by:lower():gsub("-", "_")
end
local ENTRIES = {}
for _, name in ipairs(FLEET.listed) do
    ENTRIES[name] = cjson.encode({
        id = name, object = "model", created = 0, owned_by = FLEET.fleet,
        state = FLEET.states[FLEET.names[name]],
    })
end

-- Ends the request: what calls this goes no further. NGINX sends the answer (/.error).
local function refuse(status, code, message, param, kind)
    var.fleet_code = code
    var.fleet_refusal = cjson.encode({error = {
        message = message, type = kind or "invalid_request_error",
        param = param or null, code = code,
    }})
    return ngx.exit(status)
end

local function refuse_path()
    return refuse(404, "unknown_url", "No such path; the OpenAI API is below /v1/.")
end

local function refuse_model(param)
    local message = "No such model; GET /v1/models lists them."
    return refuse(404, "model_not_found", message, param)
end

local TOO_MUCH = "has too many parts or is nested too deeply"

local function refuse_json(what)
    return refuse(400, "invalid_json", "The request body " .. what .. ".")
end

local function demand_method(right)
    if ngx.req.get_method() ~= right then
        ngx.header.Allow = right
        return refuse(405, "method_not_supported", "Use " .. right .. " here.")
    end
end

local function sent(name)
    local value = var[name]
    return value ~= "" and value or nil
end

-- Who calls: '' for nobody known, and for everyone where there are no tenants.
local function tenant()
    local bearer = match(var.http_authorization or "", "^[Bb][Ee][Aa][Rr][Ee][Rr] +([^ ]+) *$")
    local key = bearer or sent("http_api_key") or sent("http_x_api_key")
    return key and TENANTS[sha256(key)] or ""
end

local gateway = {tenant = tenant}

-- Lets in who is known, and leaves the caller's limits for NGINX to count by.
function gateway.admit()
    if FLEET.keys == null then
        return
    end
    local name = tenant()
    if name == "" then
        return ngx.exit(401)
    end
    var.fleet_tenant = name
    local limits = FLEET.tenants[name]
    if limits.rate ~= null then
        var.fleet_rate = limits.rate
    end
    if limits.concurrency ~= null then
        var.fleet_concurrency = limits.concurrency
    end
end

local function may_use(model)
    local allowed = ALLOWED[var.fleet_tenant]
    return allowed == ALL or allowed and allowed[model]
end

-- The bytes of the request's body, once it was read.
local function received()
    if (tonumber(var.http_content_length) or 0) > HUGE then
        collectgarbage()
    end
    local text = ngx.req.get_body_data()
    if not text and ngx.req.get_body_file() then
        -- So many chunks that the body no longer fits its buffer.
        return ngx.exit(413)
    end
    return text or ""
end

-- What cjson takes and JSON has not does not match this: control characters in strings, NUL, and
-- bytes that are no UTF-8, for which every pattern with the option `u` looks.
local SOUND = [[[^"\x00]*+(?:"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"[^"\x00]*+)*+\z]]

-- The request's body, whatever its JSON stands for.
local function read(text)
    local body, why = cjson.decode(text)
    if body == nil then
        return refuse_json(find(why, "nested", 1, true) and TOO_MUCH or "is not JSON")
    end
    if not re_find(text, SOUND, "ajou") then
        return refuse_json("is not JSON")
    end
    return body
end

-- A long body is looked at where NGINX holds it: to copy 256 KiB into Lua costs more than all else
-- that is done with it. These are the functions by which ngx.var and ngx.re work.
local ONCE_TO_MACHINE_CODE = 0x05
local why = ffi.new("char *[1]")
local place, size = ffi.new("char *[1]"), ffi.new("size_t[1]")
local HELD, lowered = "request_body", ffi.new("char[12]")

local function held()
    local asked = base.get_request()
    if C.ngx_http_lua_ffi_var_get(asked, HELD, #HELD, lowered, 0, place, size, why) == 0 then
        return place[0], tonumber(size[0])
    end
end

local function compiled(pattern)
    local said = ffi.new("unsigned char[256]")
    local made = C.ngx_http_lua_ffi_compile_regex(
        pattern, #pattern, ONCE_TO_MACHINE_CODE, 0, said, 256)
    assert(made ~= nil, pattern)
    return ffi.gc(made, C.ngx_http_lua_ffi_destroy_regex)
end

local function execute(pattern, text, length, from)
    return C.ngx_http_lua_ffi_exec_regex(pattern, ONCE_TO_MACHINE_CODE, text, length, from)
end

-- How many captures a pattern's first match from there on has, itself one of them; nil: no match.
local function seek(pattern, text, length, from)
    local count = execute(pattern, text, length, from)
    assert(count > 0 or count == -1, "PCRE has failed")
    return count > 0 and count or nil
end

local MODEL = compiled([["model"(?:\s*:\s*"([^"\\]+)")?+]])
-- Escapes that could spell a key, and what could ask for a stream.
local ESCAPE = compiled([=[\\u00[67]]=])
local STREAM = compiled([["stream"(?!\s*:\s*false)]])

-- An object as most are that ask for no stream, with its model. What matches is JSON and can be read
-- in one way; of JSON what has escapes in its own keys, surrogates or a hundred levels may not match.
local PLAIN = compiled([[(*UTF)(?x)
    \A (?&space) \{ (?: (?&other) , )*+
        (?&space) "model" (?&space) : (?&space) "([^"\\\x00-\x1f]++)" (?&space)
    (?: , (?&other) )*+ \} (?&space) \z
    (?(DEFINE)
        (?<other> (?&space) (?: "stream" (?&space) : (?&space) false (?&space)
            | (?! "(?:model|stream)" ) "[^"\\\x00-\x1f]*+" (?&space) : (?&value) ) )
        (?<pair> (?&space) (?&text) (?&space) : (?&value) )
        (?<value> (?&space) (?> (?&text) | (?&number) | true | false | null
            | \[ (?> (?&value) (?: , (?&value) )*+ | (?&space) ) \]
            | \{ (?> (?&pair) (?: , (?&pair) )*+ | (?&space) ) \} ) (?&space) )
        (?<text> "[^"\\\x00-\x1f]*+(?: \\ (?: ["\\/bfnrt] | u [0-9a-cefA-CEF] [0-9a-fA-F]{3} )
            [^"\\\x00-\x1f]*+ )*+" )
        (?<number> -?+ (?: 0 | [1-9] [0-9]*+ ) (?: \. [0-9]++ )?+ (?: [eE] [+-]?+ [0-9]++ )?+ )
        (?<space> [ \t\n\r]*+ )
    )]])

local function captured(pattern, text)
    local from, to = pattern.captures[2], pattern.captures[3]
    return ffi.string(text + from, to - from)
end

-- A body's model, if it asks for no stream; nil if this can't be seen at once. A short one is JSON
-- then. Whatever else stands in a long one its engine will see, which refuses what is no JSON.
local function glance()
    local length = tonumber(var.http_content_length)
    if not length then
        return nil
    end
    local text, known = held()
    if known ~= length then
        return nil
    end
    if length <= LONG then
        return execute(PLAIN, text, length, 0) > 0 and {model = captured(PLAIN, text)} or nil
    end
    if text[0] ~= 123 or text[1] == 0 then -- as UTF-16 begins
        return nil
    end
    if seek(MODEL, text, length, 0) ~= 2 then
        return nil
    end
    local to, model = MODEL.captures[1], captured(MODEL, text)
    if seek(MODEL, text, length, to) or seek(ESCAPE, text, length, 0)
        or seek(STREAM, text, length, 0) then
        return nil
    end
    return {model = model}
end

-- Patterns of one member of an object, which needs no table of all that is in it. Of JSON they match
-- exactly that; what they match of anything else every engine refuses.
local STRING = [["[^"\\]*+(?:\\.[^"\\]*+)*+"]]
local KEY = [[\s*+[{,]\s*+(]] .. STRING .. [[)\s*+:\s*+]]
local VALUE = "(?:(" .. STRING .. [=[)|([\[{](?:[^\[\]{}"]++|(?1)|(?2))*+[\]}])|[^\s,\[\]{}"]++)]=]
local END = [[\s*+(?:\{\s*+)?\}\s*+\z]]

-- Iterates over an object's members: each one's key, and where key, value and value's end are.
local function members(text)
    local place, count = {pos = 1}, 0
    return function()
        local from, to = re_find(text, KEY, "ajos", place, 1)
        if not from then
            return not re_find(text, END, "ajos", place) and refuse_json("is not JSON") or nil
        end
        local value, last, why = re_find(text, VALUE, "ajos", place)
        count = count + 1
        if why or count > MOST_MEMBERS then
            return refuse_json(TOO_MUCH)
        elseif not value then
            return refuse_json("is not JSON")
        end
        return read(sub(text, from, to)), from, value, last
    end
end

local READ = set({"model", "stream", "stream_options"})

-- What the gateway needs to know of a long body.
local function skim(text)
    local body = {}
    for key, _, from, to in members(text) do
        if READ[key] then
            body[key] = read(sub(text, from, to))
        end
    end
    return body
end

-- The request's body, and its text unless a glance told enough.
local function opened()
    ngx.req.read_body()
    local body = glance()
    if body then
        return body
    end
    local text = received()
    if #text > LONG then
        return skim(text), text
    end
    return read(text), text
end

local function is_true(value)
    return TRUE[tostring(value):lower()]
end

-- A stream tells its tokens only if it is asked to, so it is asked; docs/decisions/0010. The event
-- that tells them is hidden from a client that did not ask itself (answer.lua).
local function must_ask_for_usage(path, body)
    if not COMPLETION_PATHS[path] or type(body) ~= "table" or not is_true(body.stream) then
        return false
    end
    local options = body.stream_options
    if options == nil or options == null then
        return true
    end
    return type(options) == "table" and not is_true(options.include_usage)
end

-- The body for a fallback, which knows the model by another name.
local function renamed(text, model, asks)
    local kept, options = {'"model":' .. cjson.encode(model)}, nil
    for key, from, value, to in members(text) do
        if asks and key == "stream_options" then
            options = read(sub(text, value, to))
        elseif key ~= "model" then
            kept[#kept + 1] = sub(text, from, to)
        end
    end
    if asks then
        options = type(options) == "table" and options or {}
        options.include_usage = true
        kept[#kept + 1] = '"stream_options":' .. cjson.encode(options)
    end
    return "{" .. table.concat(kept, ",") .. "}"
end

-- Asks a model's fallback, by the name that the model has there.
local function send_away(model, path, text, asks)
    local away = FLEET.external[model]
    ngx.req.set_body_data(renamed(text, away.model, asks))
    var.fleet_asking = asks and "yes" or ""
    var.fleet_upstream = "external." .. model
    var.fleet_url = "https://" .. away.url .. sub(path, #"/v1" + 1)
    return ngx.exec("@external")
end

-- What this request has in common with those that belong to the same replica; nil: with none.
local function affinity(model)
    return AFFINITY[model] and sent(AFFINITY[model])
end

-- From 0 to 1, by chance; for equal words the same: a session does not change sides.
local function drawn(word)
    if not word then
        return math.random()
    end
    local a, b, c, d = sha256(word):byte(1, 4)
    return (((a * 256 + b) * 256 + c) * 256 + d) / 0x100000000
end

-- With TLS or without; `open` is the share of the replicas that have none.
local function is_open(open)
    return open == 1 or open > 0 and math.random() < open
end

-- Which replicas of a model that is ready get this request, and whether they are open.
local function upstream(model)
    local common, canary = affinity(model), FLEET.canaries[model]
    local suffix, open = "", FLEET.open[model]
    if canary then
        local tried = drawn(common) * 100 < canary.share
        var.fleet_trial = (tried and "canary." or "rest.") .. canary.revision
        if tried then
            suffix, open, common = ".canary", canary.open, nil
        end
    end
    if common then
        var.fleet_affinity = common
        suffix = ".sticky"
    end
    open = is_open(open)
    return (open and "open." or "model.") .. model .. suffix, open
end

-- Passes a request on to the replicas of a model; every way to one goes through here. `body` is
-- what the request's body says, and `text` that itself, each if it is known.
local function send(model, path, body, text)
    if not may_use(model) then
        return refuse(403, "model_not_found", "This key may not use that model.", "model")
    end
    if EXHAUSTED[var.fleet_tenant] then
        -- Until the next day begins, so nothing retries before.
        ngx.header["Retry-After"] = DAY_S - ngx.time() % DAY_S
        ngx.header["X-Should-Retry"] = "false"
        local message = "The tokens of this day are used up; the next day begins at 00:00 UTC."
        return refuse(429, "insufficient_quota", message, nil, "insufficient_quota")
    end
    var.fleet_model = model
    local asks = must_ask_for_usage(path, body)
    local state = FLEET.states[model]
    if state ~= "ready" then
        if FLEET.external[model] and EXTERNAL_PATHS[path] then
            ngx.req.read_body()
            text = text or received()
            if find(text, "^%s*{") then
                return send_away(model, path, text, asks)
            end
        end
        ngx.header["Retry-After"] = RETRY_AFTER_S[state]
        local message = "No replica of this model is ready; try again."
        return refuse(503, "model_not_ready", message, nil, "server_error")
    end
    local name, open = upstream(model)
    local url = (open and "http://" or "https://") .. name .. path
    var.fleet_url = var.args and url .. "?" .. var.args or url
    if not open then
        -- By which it is shown its key.
        var.fleet_upstream = name
    end
    if asks then
        -- Of two keys of one name the last one holds.
        local last = #text
        while text:byte(last) ~= 125 do
            last = last - 1
        end
        var.fleet_asking = "yes"
        local question = ',"stream_options":{"include_usage":true}}'
        ngx.req.set_body_data(sub(text, 1, last - 1) .. question)
    end
end

-- A full queue (503) takes a replica out for seconds as a dead node does, and NGINX asks nobody
-- where all are out: it leaves the upstream's name where a replica's address would be. So that one who
-- fills all queues shuts out nobody else, all of them are asked then. Not if one has failed
-- otherwise, though: it may have died of this very request.
function gateway.ask_any()
    if not find(var.upstream_addr or "", "%a[%w.-]*$")
        or not find(var.upstream_status, "^[503, ]*502$") then
        return ngx.exit(502)
    end
    var.fleet_url = gsub(var.fleet_url, "^(%l+://%l+%.[^./]+)[^/]*", "%1.any")
end

-- /m/MODEL/v1/...: for bodies that are not JSON, and for what has none.
local function route_by_path(model, path)
    local right = find(path, RESPONSE_PATH) and "GET" or "POST"
    if right == "POST" and not JSON_PATHS[path] and not UPLOAD_PATHS[path]
        and not find(path, CANCEL_PATH) then
        return refuse_path()
    end
    demand_method(right)
    if not FLEET.states[model] then
        return refuse_model()
    end
    if not COMPLETION_PATHS[path] then
        return send(model, path)
    end
    -- Read all the same, or its tokens would not be asked for.
    return send(model, path, opened())
end

function gateway.route()
    local path = var.uri
    if not JSON_PATHS[path] then
        local model, rest = match(path, "^/m/([a-z0-9-]+)(/.*)$")
        if model then
            return route_by_path(model, rest)
        end
        if UPLOAD_PATHS[path] then
            local message = "This path has no JSON body: use /m/MODEL" .. path .. "."
            return refuse(404, "unknown_url", message)
        end
        return refuse_path()
    end
    demand_method("POST")
    local body, text = opened()
    local name = type(body) == "table" and body.model
    if type(name) ~= "string" or name == "" then
        local message = "The request body must name a model."
        return refuse(400, "model_required", message, "model")
    end
    local model = FLEET.names[name]
    if not model then
        return refuse_model("model")
    end
    return send(model, path, body, text)
end

local function say(text)
    ngx.req.discard_body()
    ngx.header["Content-Length"] = #text
    return ngx.print(text)
end

-- GET /v1/models and /v1/models/NAME: what this tenant may use, and whether it can be used now.
function gateway.models()
    if ngx.req.get_method() ~= "HEAD" then
        demand_method("GET")
    end
    local path = var.uri
    if path == "/v1/models" then
        local shown = {}
        for _, name in ipairs(FLEET.listed) do
            if may_use(FLEET.names[name]) then
                shown[#shown + 1] = ENTRIES[name]
            end
        end
        return say('{"object":"list","data":[' .. table.concat(shown, ",") .. "]}")
    end
    local name = match(path, "^/v1/models/(.*)$")
    if not ENTRIES[name] or not may_use(FLEET.names[name]) then
        return refuse_model()
    end
    return say(ENTRIES[name])
end

return gateway
