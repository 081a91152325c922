-- One circuit, for all its clients: the rules of dspy_resilient/circuit/machine.py, under the names
-- they have there, and of MemoryStore.circuit. KEYS[1]: the circuit. ARGV[1]: policy and report as
-- JSON, without what is None. ARGV[2]: milliseconds to keep it for. Returns a view as JSON.

local request = cjson.decode(ARGV[1])
local policy = request.policy
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local buckets = 12
local machine

local function new()
  return {
    state = 'closed', generation = 0, since = now, open_until = now, failures = 0, openings = 0,
    successes = 0, window = {}, places = {},
  }
end

local function passes() return machine.state == 'closed' or machine.state == 'forced_closed' end
local function refuses() return machine.state == 'open' or machine.state == 'forced_open' end

local function held()
  if not passes() or machine.openings == 0 then return machine.openings end
  local forgiven = math.floor((now - machine.since) / policy.recovery_time)
  return math.max(0, machine.openings - forgiven)
end

local function enter(state)
  machine.openings = held()
  machine.state = state
  machine.since = now
  machine.generation = math.max(math.floor(now * 1e6), machine.generation + 1)
  machine.successes = 0
  machine.places = {}
end

local function floor(retry_after)
  if not retry_after or not (retry_after > 0) then return 0 end
  return math.min(retry_after, policy.max_recovery_time)
end

local function open(reason, error, retry_after)
  if machine.successes > 0 then machine.openings = math.max(0, machine.openings - 1) end
  local seconds = policy.recovery_time * policy.backoff ^ held()
  seconds = math.min(seconds, policy.max_recovery_time)
  seconds = seconds * (1 + policy.jitter * (2 * request.draw - 1))
  enter('open')
  machine.open_until = now + math.max(seconds, floor(retry_after))
  machine.reason = reason
  machine.error = error
  machine.openings = machine.openings + 1
end

local function close()
  enter('closed')
  machine.openings = math.min(machine.openings, policy.steps + 1)
  machine.failures = 0
  machine.window = {}
end

local function add(failed, slow)
  local tick = math.floor(now / (policy.window / buckets))
  local window = {}
  local totals = {0, 0, 0}
  for _, bucket in ipairs(machine.window) do
    if bucket[1] > tick - buckets and bucket[1] <= tick then window[#window + 1] = bucket end
  end
  local last = window[#window]
  if not last or last[1] ~= tick then
    last = {tick, 0, 0, 0}
    window[#window + 1] = last
  end
  last[2] = last[2] + 1
  if failed then last[3] = last[3] + 1 elseif slow then last[4] = last[4] + 1 end
  for _, bucket in ipairs(window) do
    for i = 1, 3 do totals[i] = totals[i] + bucket[i + 1] end
  end
  machine.window = window
  return totals[1], totals[2], totals[3]
end

local function reached(count, calls, rate)
  return calls >= policy.min_calls and count / calls >= rate
end

local function succeed(slow)
  if machine.state == 'half_open' then
    if slow then return open('slow') end
    machine.successes = machine.successes + 1
    if machine.successes >= policy.successes_to_close then close() end
    return
  end
  machine.failures = 0
  local calls, _, slows = add(false, slow)
  if slow and machine.state == 'closed' and reached(slows, calls, policy.slow_rate) then
    open('slow')
  end
end

local function fail(verdict)
  machine.failures = machine.failures + 1
  machine.error = verdict.error
  if machine.state == 'half_open' then
    return open(verdict.reason, verdict.error, verdict.retry_after)
  end
  local calls, failures = add(true, false)
  if machine.state == 'closed' and (
    machine.failures >= policy.failure_threshold
    or reached(failures, calls, policy.failure_rate)
    or verdict.reason == 'billing'
  ) then
    open(verdict.reason, verdict.error, verdict.retry_after)
  end
end

local function count(verdict)
  local generation = machine.generation
  if verdict.outcome == 'failure' then
    fail(verdict)
  elseif verdict.outcome == 'success' then
    for i = 1, verdict.number do
      if machine.generation == generation then succeed(i > verdict.number - verdict.slow) end
    end
  end
  if verdict.probe then machine.places[verdict.probe] = nil end
end

local function taken()
  local number = 0
  for name, lease_end in pairs(machine.places) do
    if lease_end > now then number = number + 1 else machine.places[name] = nil end
  end
  return number
end

local function lets_probe()
  if passes() then return false end
  if machine.state ~= 'half_open' then
    local early = request.early and machine.state == 'open'
      and now >= machine.since + policy.recovery_time
    if now < machine.open_until and not early then return false end
    enter('half_open')
  end
  return taken() < policy.probes
end

local function adopt(generation)
  machine = new()
  machine.state = request.state
  machine.generation = generation
  machine.since = now - request.age
  machine.open_until = now + (request.remaining or math.huge)
  machine.failures = request.failures
  machine.openings = request.openings
  machine.reason = request.reason
  machine.error = request.error
end

local function hear()
  local believed = request.generation or math.floor((now - request.age) * 1e6)
  local accepted = believed > machine.generation
  if accepted then adopt(believed) end
  for _, verdict in ipairs(request.verdicts) do
    if machine.generation == believed then count(verdict) end
  end
  local granted = request.probe ~= nil and lets_probe()
  if granted then machine.places[request.probe] = now + request.lease end
  taken()
  local view = {
    at = string.format('%.17g', now),
    generation = string.format('%.0f', machine.generation),
    accepted = accepted,
    granted = granted,
    places = {},
    state = machine.state,
    age = now - machine.since,
    remaining = 0,
    failures = machine.failures,
    openings = machine.openings,
    reason = machine.reason,
    error = machine.error,
  }
  for name, lease_end in pairs(machine.places) do view.places[name] = lease_end - now end
  if refuses() then
    view.remaining = math.max(0, machine.open_until - now)
    if view.remaining == math.huge then view.remaining = nil end
  end
  return cjson.encode(view), cmsgpack.pack(machine)
end

-- Whatever else lies under our key is no circuit: begin anew.
local sound, view, packed
local kept = redis.call('GET', KEYS[1])
if kept then
  sound, machine = pcall(cmsgpack.unpack, kept)
  if sound and type(machine) == 'table' then sound, view, packed = pcall(hear) else sound = false end
end
if not sound then
  machine = new()
  view, packed = hear()
end
redis.call('SET', KEYS[1], packed, 'PX', ARGV[2])
return view
