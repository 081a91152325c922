-- One retry budget, for all its clients: the rules of MemoryStore.budget. KEYS[1]: the budget.
-- ARGV[1]: a report as JSON. ARGV[2]: milliseconds to keep it for. Returns a view as JSON.

local request = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local before = tonumber(redis.call('GET', KEYS[1]) or request.believed)

-- Whatever else lies under our key is no number of tokens: begin anew.
if not before or before ~= math.floor(before) or before < 0 or before > 2 ^ 53 then
  before = request.believed
end

local most = math.max(request.most, before) -- others may have a larger budget
local spent = math.max(request.least, math.min(before + request.net, most))
spent = string.format('%.0f', spent)
redis.call('SET', KEYS[1], spent, 'PX', ARGV[2])
return cjson.encode({at = time[1] .. '.' .. string.format('%06d', time[2]), spent = spent})
