-- The books of a budget: the rules of MemoryStore.spend. KEYS[1]: what each member has spent and
-- holds. ARGV[1]: a report as JSON. ARGV[2]: milliseconds to keep it for. Returns a view as JSON.

local report = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local members = {}

-- Whatever else lies under our key is no books: begin anew.
local sound, kept = pcall(cmsgpack.unpack, redis.call('GET', KEYS[1]) or '')
if sound and type(kept) == 'table' then
  for name, member in pairs(kept) do
    if type(member) == 'table' and #member == 7 then members[name] = member end
  end
end

local me = {now + report.lease}
for i = 1, 3 do me[1 + i], me[4 + i] = report.spent[i], report.held[i] end
members[report.member] = me

local spent, reserved, granted = {0, 0, 0}, {0, 0, 0}, {0, 0, 0}
for _, member in pairs(members) do
  for i = 1, 3 do
    spent[i] = spent[i] + member[1 + i]
    if member[1] > now then
      reserved[i] = reserved[i] + member[4 + i]
    else
      spent[i] = spent[i] + member[4 + i]
    end
  end
end

for _, want in ipairs(report.wants) do
  local fits = true
  for i = 1, 3 do
    local most = report.limit[i]
    if most ~= cjson.null and spent[i] + reserved[i] + want[i] > most + 1e-9 * math.max(1, most) then
      fits = false
    end
  end
  if fits then
    for i = 1, 3 do
      granted[i] = granted[i] + want[i]
      reserved[i] = reserved[i] + want[i]
      me[4 + i] = me[4 + i] + want[i]
    end
  end
end

redis.call('SET', KEYS[1], cmsgpack.pack(members), 'PX', ARGV[2])
local function exact(amounts)
  return {string.format('%.17g', amounts[1]), string.format('%.17g', amounts[2]),
          string.format('%.17g', amounts[3])}
end
return cjson.encode({at = string.format('%.17g', now), spent = exact(spent), reserved = exact(reserved),
                     granted = exact(granted)})
