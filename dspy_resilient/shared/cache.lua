-- The answers that the clients of one name share: the rules of MemoryStore.cache. KEYS[1]: when all
-- were last forgotten. KEYS[2..]: one answer each, a time of 17 bytes and the text. ARGV[1]: bytes
-- of the longest text. ARGV[2]: milliseconds after which what nobody uses is forgotten. Then, for
-- each answer, what to do, milliseconds after which it is of no use, and the text. Returns for each
-- its age and text, or false.

local most, day = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local forgotten = tonumber(redis.call('GET', KEYS[1]) or '') or 0

-- Whatever else lies under our key is no answer: a string of another length, or no string at all.
local function load(key, kept)
  local size = redis.pcall('STRLEN', key)
  if type(size) ~= 'number' or size <= 17 or size > 17 + most then return false end
  local entry = redis.call('GET', key)
  local stored = tonumber(string.sub(entry, 1, 17))
  if not stored or stored <= forgotten then
    redis.call('DEL', key)
    return false
  end
  local age = math.abs(now - stored) -- the clock of another node may have been ahead
  if age * 1000 >= kept then return false end
  local life = math.min(kept - age * 1000, day)
  if redis.call('PTTL', key) < life / 2 then redis.call('PEXPIRE', key, math.ceil(life)) end
  return {string.format('%.6f', age), string.sub(entry, 18)}
end

-- Later than the last forgetting, though that may have been in this very trip.
local function stamp()
  return string.format('%017.6f', forgotten >= now and forgotten + 1e-6 or now)
end

local replies = {}
for i = 2, #KEYS do
  local doing, kept, text = ARGV[3 * i - 3], tonumber(ARGV[3 * i - 2]), ARGV[3 * i - 1]
  replies[i - 1] = false
  if doing == 'load' then
    replies[i - 1] = load(KEYS[i], kept)
  elseif doing == 'store' then
    local life = math.ceil(math.min(kept, day))
    redis.call('SET', KEYS[i], stamp() .. text, 'PX', life)
  elseif doing == 'forget' then
    redis.call('DEL', KEYS[i])
  else
    local all = stamp()
    forgotten = tonumber(all)
    redis.call('SET', KEYS[1], all, 'PX', 2 * day)
  end
end
return replies
