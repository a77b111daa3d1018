-- wrk -s wrk.lua URL -- BODY_FILE KEY SPREAD_MS CONNECTIONS_OF_A_THREAD. Its figures come as one line of JSON.
-- With SPREAD_MS the connections' first requests are spread over that time: without it all of them
-- go on in one wave, and what is measured is the wave.
function init(args)
    local file = assert(io.open(args[1], "rb"))
    wrk.method = "POST"
    wrk.body = file:read("*a")
    wrk.headers["Content-Type"] = "application/json"
    wrk.headers["Authorization"] = "Bearer " .. args[2]
    local spread, connections = tonumber(args[3]), tonumber(args[4])
    if spread > 0 then
        math.randomseed(1)
        local asked = 0
        function delay()
            asked = asked + 1
            return asked <= connections and math.random(0, spread) or math.random(0, spread / 50)
        end
    end
end

function done(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '{"seconds":%.6f,"requests":%d,"p50_us":%d,"p99_us":%d,"failed":%d}\n',
        summary.duration / 1e6, summary.requests, latency:percentile(50), latency:percentile(99),
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
