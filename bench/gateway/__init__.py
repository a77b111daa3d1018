"""What the gateway costs: ours against no gateway, plain NGINX, Lua and two routers of others."""
