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
    state = 'closed', generation = 0, since = now, open_until = now, run_began = now,
    failing_since = now, failures = 0, share = policy.first_share, interval = policy.recovery_time,
    latest = {}, window = {},
  }
end

local function passes() return machine.state == 'closed' or machine.state == 'forced_closed' end

local function enter(state)
  machine.state = state
  machine.since = now
  machine.generation = math.max(math.floor(now * 1e6), machine.generation + 1)
  machine.interval = policy.recovery_time
end

local function jittered(seconds)
  return seconds * (1 + policy.jitter * (2 * request.draw - 1))
end

local function floor(retry_after)
  return math.max(0, retry_after or 0)
end

local function open(reason, error, retry_after, began)
  local seconds = math.max(jittered(policy.recovery_time), floor(retry_after))
  enter('open')
  machine.open_until = now + seconds
  machine.run_began = began
  machine.reason = reason
  machine.error = error
end

local function end_run()
  local share = 1 - (1 - machine.share) * policy.memory ^ machine.failures
  if machine.failures > 0 then machine.share = math.min(share, policy.highest_share) end
  machine.failures = 0
end

local function close()
  end_run()
  enter('closed')
  machine.latest = {}
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

local function succeed(began, slow, ended)
  if machine.state == 'open' then
    if began >= machine.run_began and ended >= machine.since and not slow then close() end
    return
  end
  if ended >= machine.failing_since then end_run() end
  machine.share = machine.share * policy.memory
  if not policy.failure_rate and not policy.slow_call then return end
  local calls, _, slows = add(false, slow)
  local is_slow = calls >= policy.min_calls and slows >= policy.slow_rate * calls
  if slow and machine.state == 'closed' and is_slow then open('slow', nil, nil, now) end
end

local function is_surprising()
  if machine.failures < policy.failure_threshold or policy.surprise == 0 then return false end
  if machine.share < policy.common_share then return true end
  local enough = math.log(policy.surprise) / math.log(machine.share)
  return machine.failures >= math.min(policy.longest_run, enough)
end

local function fails_too_often()
  if not policy.failure_rate and not policy.slow_call then return false end
  local calls, failures = add(true, false)
  local latest = machine.latest
  latest[#latest + 1] = now
  if #latest > policy.failure_threshold then table.remove(latest, 1) end
  if not policy.failure_rate or #latest < policy.failure_threshold then return false end
  if now - latest[1] > policy.window then return false end
  return calls >= policy.min_calls and failures >= policy.failure_rate * calls
end

local function fail(verdict, began)
  machine.error = verdict.error
  if not passes() then
    if machine.state == 'open' then
      machine.open_until = math.max(machine.open_until, now + floor(verdict.retry_after))
    end
    return
  end
  if machine.failures == 0 then machine.run_began, machine.failing_since = began, now end
  machine.failures = machine.failures + 1
  local too_many = fails_too_often()
  if machine.state == 'closed'
    and (too_many or verdict.reason == policy.at_once or is_surprising()) then
    open(verdict.reason, verdict.error, verdict.retry_after, machine.run_began)
  end
end

local function count(verdict, current)
  local began = now - verdict.age
  if verdict.outcome == 'success' then
    for i = 1, verdict.number do succeed(began, i > verdict.number - verdict.slow, now - verdict.late) end
  elseif current then
    fail(verdict, began)
  end
end

local function lets_probe()
  if passes() or now < machine.open_until then return false end
  machine.state = 'open'
  local longest = math.max(policy.recovery_time, policy.max_recovery_time)
  machine.interval = math.min(machine.interval * policy.backoff, longest)
  machine.open_until = now + jittered(machine.interval)
  return true
end

local function adopt(generation)
  machine = new()
  machine.state = request.state
  machine.generation = generation
  machine.since = now - request.age
  machine.open_until = now + (request.remaining or math.huge)
  machine.run_began = now - request.run_age
  machine.failures = request.failures
  machine.share = request.share
  machine.reason = request.reason
  machine.error = request.error
end

local function hear()
  local believed = request.generation or math.floor((now - request.age) * 1e6)
  if believed > machine.generation then adopt(believed) end
  for _, verdict in ipairs(request.verdicts) do
    count(verdict, machine.generation == believed)
  end
  local view = {
    granted = request.probe and lets_probe(),
    generation = string.format('%.0f', machine.generation),
    state = machine.state,
    age = now - machine.since,
    remaining = 0,
    run_age = now - machine.run_began,
    failures = machine.failures,
    share = machine.share,
    reason = machine.reason,
    error = machine.error,
  }
  if not passes() then
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
