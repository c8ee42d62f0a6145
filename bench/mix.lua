-- Shoppers: 85 of 100 requests read a cart, 11 add to it, 4 empty it. ADDS=1 in the environment: all add.
local users = 10000
local headers = { ["Content-Type"] = "application/json" }
local adds_only = os.getenv("ADDS") ~= nil

function init()
  math.randomseed(os.time())
end

function request()
  local path = "/cart/users/u" .. math.random(users)
  local draw = adds_only and 90 or math.random(100)
  if draw <= 85 then
    return wrk.format("GET", path)
  elseif draw <= 96 then
    return wrk.format("POST", path, headers, '{"product_id": "p' .. math.random(20) .. '", "quantity": 1}')
  end
  return wrk.format("DELETE", path)
end

function done(summary, latency)
  print(string.format("%.0f %.1f", summary.requests / summary.duration * 1e6, latency:percentile(99) / 1e3))
end
