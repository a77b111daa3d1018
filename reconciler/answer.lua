-- Looks at a replica's answer on its way to the client and leaves for the access log: when its first
-- byte came, how it ended, and its tokens. What passes stays as it is, byte for byte, but for one
-- event of a stream: where gateway.lua asked for the tokens and the client did not, the event that
-- tells them is taken out, as some clients fail on its empty `choices`.
--
-- A chunk without any of the marks leaves nothing behind: an engine's event comes whole, nearly
-- always, and most hold none of them.
local folder, gateway = ...
local ffi = require("ffi")
local find, match, sub = string.find, string.match, string.sub
local ngx, var = ngx, ngx.var

ffi.cdef("int access(const char *path, int mode);")

-- The marks can't be forged by what a model writes: in a JSON text its quotes have a backslash.
local FINISH = '"finish_reason":"'
local USAGE = '"usage":{'
local FAILED = 'data: {"error"'
local NO_CHOICES = '"choices":[]'
-- Of a reason or usage, and of an event that says either.
local LONGEST = 512
local LONGEST_EVENT = 16384
-- While this file is there a reload is near (gateway.sh); it is looked for ten times a second.
local CLOSING = folder .. "/closing"
local LOOK_S = 0.1
local looked_at, closing = 0, false

local answer = {}

local function is_closing()
    local now = ngx.now()
    if now - looked_at >= LOOK_S then
        looked_at, closing = now, ffi.C.access(CLOSING, 0) == 0
    end
    return closing
end

-- NGINX ends idle connections at a reload, although a request may be on its way on one. So for a
-- moment before, and for as long as an old worker lives, each answer asks the client to end its own; a
-- stream always does, as it says so long before it ends. HTTP/2 has frames for that, and forbids the
-- header.
function answer.head()
    local seen = ngx.ctx
    seen.stream = find(ngx.header.content_type or "", "text/event-stream", 1, true) == 1
    if (ngx.req.http_version() or 1) < 2 and (seen.stream or is_closing()) then
        ngx.header.Connection = "close"
    end
    seen.hides = seen.stream and var.fleet_hides ~= ""
    if seen.hides then
        -- An event that is hidden would be missing from the length that a stream may have told.
        ngx.header.content_length = nil
    end
end

-- Of several choices the one that failed tells how it was.
local function finish(seen, reason)
    if seen.finish ~= "abort" and seen.finish ~= "error" then
        seen.finish = reason
    end
end

local function note(seen, text)
    local at = find(text, FINISH, 1, true)
    while at do
        local reason = match(text, '^([%w_]+)"', at + #FINISH)
        if reason then
            finish(seen, reason)
        end
        at = find(text, FINISH, at + 1, true)
    end
    if seen.stream and find(text, FAILED, 1, true) then
        finish(seen, "error")
    end
    at = find(text, USAGE, 1, true)
    while at do
        local usage = sub(text, at, at + 450)
        local prompt = match(usage, '"prompt_tokens":(%d+)') or match(usage, '"input_tokens":(%d+)')
        if prompt then
            seen.prompt = prompt
            -- An embedding has none.
            seen.completion = match(usage, '"completion_tokens":(%d+)')
                or match(usage, '"output_tokens":(%d+)') or "0"
        end
        at = find(text, USAGE, at + 1, true)
    end
end

local function notice(seen, text)
    if find(text, USAGE, 1, true) or find(text, FINISH, 1, true) or find(text, FAILED, 1, true) then
        note(seen, text)
    end
end

-- Reason and usage may stand anywhere in an answer or event: what follows them, such as the prompt's
-- own tokens, is as long as the caller wants it. The seam is for what stands across two chunks.
local function search(seen, chunk)
    local known = chunk
    if seen.held ~= "" then
        local seam = seen.held .. sub(chunk, 1, LONGEST)
        notice(seen, seam)
        known = #chunk < LONGEST and seam or chunk
    end
    notice(seen, chunk)
    seen.held = seen.stream and sub(chunk, -2) == "\n\n" and "" or sub(known, -LONGEST)
end

local function without_usage(events)
    local kept, from = {}, 1
    while from <= #events do
        local _, to = find(events, "\n\n", from, true)
        local event = sub(events, from, to or -1)
        if not find(event, NO_CHOICES, 1, true) or not find(event, USAGE, 1, true) then
            kept[#kept + 1] = event
        end
        from = from + #event
    end
    return table.concat(kept)
end

-- A client can't use half an event, so one that is to be hidden may wait for its other half.
local function hide(seen, chunk, last)
    local whole = seen.held .. chunk
    seen.held = ""
    if not last and sub(whole, -2) ~= "\n\n" then
        local begins = match(whole, ".*\n\n()") or 1
        if #whole - begins < LONGEST_EVENT then
            seen.held = sub(whole, begins)
            whole = sub(whole, 1, begins - 1)
        end
    end
    notice(seen, whole)
    if find(whole, USAGE, 1, true) then
        whole = without_usage(whole)
    end
    if whole ~= chunk then
        ngx.arg[1] = whole
    end
end

function answer.watch()
    local seen, chunk, last = ngx.ctx, ngx.arg[1], ngx.arg[2]
    if not seen.pieces then
        -- Until its last byte has come; what was seen of its end by then says more.
        seen.pieces, seen.held, seen.finish = 0, "", "cut"
    end
    if chunk ~= "" then
        seen.pieces = seen.pieces + 1
        seen.first_byte = seen.first_byte or var.request_time
    end
    if seen.hides then
        hide(seen, chunk, last)
    elseif chunk ~= "" then
        search(seen, chunk)
    end
    if last and seen.finish == "cut" then
        seen.finish = "whole"
    end
end

-- Writes for the access log what was seen.
function answer.log()
    local seen = ngx.ctx
    local known = seen.finish ~= "cut" and seen.finish
    if var.request_completion == "OK" then
        var.fleet_finish = known or seen.finish or "whole"
    else
        var.fleet_finish = known or "left"
    end
    if seen.first_byte then
        var.fleet_first_byte = seen.first_byte
    end
    if seen.prompt then
        var.fleet_prompt_tokens = seen.prompt
        var.fleet_completion_tokens = seen.completion
    end
    if seen.stream and seen.pieces then
        -- About its tokens, where its client left before the end.
        var.fleet_pieces = seen.pieces
    end
    if ngx.status >= 400 and var.fleet_tenant == "" then
        -- NGINX refused it before it was looked who calls.
        var.fleet_tenant = gateway.tenant()
    end
end

return answer
