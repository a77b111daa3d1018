F=/tmp/f; mkdir -p $F; chmod 777 $F
ulimit -Hn; ulimit -n
A='{"id":"x","object":"chat.completion"}'
sed -e "s#@FOLDER@#$F#;s#@CONF@#/opt/modelfleet/src/bench/gateway/conf#;s#@LISTEN@#listen 127.0.0.1:9001 backlog=4096;listen 127.0.0.1:9002;#;s#@ANSWER@#$A#" /opt/modelfleet/src/bench/gateway/conf/backend.conf > $F/n.conf
nginx -c $F/n.conf
echo '{"model":"tiny"}' >$F/b
wrk -t2 -c16 -d1s --timeout 10s -s /opt/modelfleet/src/bench/gateway/conf/wrk.lua http://127.0.0.1:9001/v1/chat/completions -- $F/b key 0 8
wrk -t1 -c100 -d3s --timeout 10s -s /opt/modelfleet/src/bench/gateway/conf/wrk.lua http://127.0.0.1:9001/v1/completions -- $F/b key 1000 100
wrk -t1 -c1000 -d3s --timeout 10s -s /opt/modelfleet/src/bench/gateway/conf/wrk.lua http://127.0.0.1:9001/v1/completions -- $F/b key 1000 1000
cat $F/error.log
