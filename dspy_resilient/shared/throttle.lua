-- One throttle gate, for all its clients: the rules of MemoryStore.throttle. KEYS[1]: the gate.
-- ARGV[1]: a report as JSON. ARGV[2]: milliseconds to keep it for. Returns a view as JSON.

local request = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local gate

local function hear()
  local closed, hinted = gate.closed, gate.hinted
  if request.reset then closed, hinted = 0, 0 end
  local reported = now + request.seconds
  if request.seconds > 0 then closed = math.max(closed, reported) end
  if request.hint > 0 then hinted = math.max(hinted, now + request.hint) end
  if closed ~= gate.closed or hinted ~= gate.hinted then
    gate = {stamp = math.max(math.floor(now * 1e6), gate.stamp + 1), closed = closed, hinted = hinted}
  end
  return cjson.encode({
    at = string.format('%.17g', now),
    stamp = string.format('%.0f', gate.stamp),
    seconds = math.max(0, closed - now),
    hint = math.max(0, hinted - now),
    longer = closed > reported,
  }), cmsgpack.pack(gate)
end

-- Whatever else lies under our key is no gate: begin anew.
local sound, view, packed
local kept = redis.call('GET', KEYS[1])
if kept then
  sound, gate = pcall(cmsgpack.unpack, kept)
  if sound and type(gate) == 'table' then sound, view, packed = pcall(hear) else sound = false end
end
if not sound then
  gate = {stamp = 0, closed = 0, hinted = 0}
  view, packed = hear()
end
-- An old closing must not be forgotten sooner because of a shorter one: never shorten its life.
local left = redis.call('PTTL', KEYS[1])
redis.call('SET', KEYS[1], packed, 'PX', math.max(left, tonumber(ARGV[2])))
return view
