-- A chat's stream as vLLM's: the role and a token at once, the other tokens later. Each event is
-- flushed, or NGINX's TLS would keep it until the next one.
local cjson = require("cjson")
local GAP_S, TOKENS = 0.005, 3
local CHUNK = 'data: {"id":"bench","object":"chat.completion.chunk","created":1,"model":"tiny",%s}\n\n'
local CHOICE = '"choices":[{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}]'
local USAGE = '"choices":[],"usage":{"prompt_tokens":5,"total_tokens":8,"completion_tokens":3}'

local function send(event)
    ngx.print(event)
    ngx.flush()
end

local function choose(delta, reason)
    send(CHUNK:format(CHOICE:format(delta, reason)))
end

ngx.req.read_body()
local asked = cjson.decode(ngx.req.get_body_data()).stream_options or {}
ngx.header.content_type = "text/event-stream"
choose('{"role":"assistant","content":""}', "null")
for token = 1, TOKENS do
    if token > 1 then
        ngx.sleep(GAP_S)
    end
    choose('{"content":" once"}', token == TOKENS and '"length"' or "null")
end
if asked.include_usage then
    send(CHUNK:format(USAGE))
end
send("data: [DONE]\n\n")
