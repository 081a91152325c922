-- The rates of one credential, for all its clients: the rules of MemoryStore.rate, which are those of
-- dspy_resilient/limits/rate.py. KEYS[1]: when each rate is full again. ARGV[1]: reports by name, as
-- JSON. ARGV[2]: milliseconds to keep it for. Returns a view as JSON.

local reports = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local longest, rates, full_in = 0, {}, {}

-- Whatever else lies under our key is no rates: begin anew.
local sound, kept = pcall(cmsgpack.unpack, redis.call('GET', KEYS[1]) or '')
if sound and type(kept) == 'table' then rates = kept end

for name, report in pairs(reports) do
  local known = rates[name]
  if type(known) ~= 'table' then known = {} end
  local full_at, fastest, till = known[1], known[2], known[3]
  if type(full_at) ~= 'number' or not (full_at < now + 1e6) then full_at = now + report[3] end
  if type(fastest) ~= 'number' or type(till) ~= 'number' or not (fastest > report[1])
    or not (fastest < math.huge) or now >= till or not (till < now + 1e3) then
    fastest, till = report[1], now + 60
  end
  full_at = math.max(full_at, now) + report[2] / (fastest / 60)
  rates[name] = {full_at, fastest, till}
  full_in[name] = string.format('%.6f', full_at - now)
  longest = math.max(longest, full_at - now)
end

local kept_for = tonumber(ARGV[2]) + math.ceil(longest * 1000)
redis.call('SET', KEYS[1], cmsgpack.pack(rates), 'PX', string.format('%.0f', kept_for))
return cjson.encode({at = string.format('%.17g', now), full_in = full_in})
