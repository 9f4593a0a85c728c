"""What the base can read: its words, keys and characters.

Owns the closed lists that the renderer draws from and that the base is trained on. Chinese characters outside `HANZI`
are outside the base's alphabet.
"""

SURNAMES = tuple("张王李赵刘陈杨黄周吴徐孙马朱林何郭高罗郑")
GIVEN = tuple("伟芳娜敏静丽强磊军洋勇艳杰娟涛明超霞平刚文华玉红建国志海云飞")

DEPARTMENTS = ("技术部", "财务部", "人事部", "市场部", "销售部", "行政部", "研发部", "采购部", "生产部", "客服部")
LEAVE_TYPES = ("年假", "病假", "事假", "婚假", "产假", "调休")
LEAVE_REASONS = ("回家", "看病", "结婚", "搬家", "旅行", "考试", "体检", "照顾家人", "个人事务", "身体不适")
INVOICE_TYPES = ("增值税发票", "普通发票", "专用发票", "电子发票")
RECEIPT_TYPES = ("收据", "小票", "收款单", "订单")
FORM_TYPES = ("请假单", "申请表", "报销单", "审批单")
ITEMS = (
    "办公用品", "打印纸", "文具", "电脑", "手机", "图书", "水果", "蔬菜", "牛奶", "面包", "咖啡", "餐费", "运费", "快递",
    "服务费", "会议费", "培训费", "住宿费", "停车费", "维修费", "设计费", "材料费", "水费", "电费", "机票", "火车票",
)  # fmt: skip
PAY_METHODS = ("现金", "微信", "支付宝", "银行卡", "信用卡", "转账")
CITIES = ("北京", "上海", "广州", "深圳", "杭州", "成都", "武汉", "南京", "西安", "天津", "重庆", "中国")
COMPANIES = ("科技", "贸易", "商贸", "物流", "建筑", "电子")
COMPANY_END = "公司"

KEYS_ZH = (
    "金额", "日期", "号码", "合计", "总计", "税额", "税率", "单价", "数量", "编号", "订单号", "单号", "账号", "税号", "电话",
    "余额", "押金", "实收", "应收", "找零", "开票日期", "发票号码", "价税合计", "交易金额", "时间", "天数", "退款", "定金",
    "姓名", "名称", "项目", "商品", "部门", "客户", "类型", "申请人", "收款人", "经办人", "事由", "开始日期", "结束日期",
    "付款方式", "销售方", "购买方", "城市", "备注", "状态", "地址",
)  # fmt: skip
WORDS_ZH = (
    *DEPARTMENTS, *LEAVE_TYPES, *LEAVE_REASONS, *INVOICE_TYPES, *RECEIPT_TYPES, *FORM_TYPES, *ITEMS, *PAY_METHODS, *CITIES,
    *COMPANIES, *KEYS_ZH, "有限公司", "发票", "单位", "规格", "型号", "已付", "未付", "同意", "合同", "单据", "表格", "内容",
    "公司", "超市", "酒店", "商店", "工资", "奖金", "折扣", "优惠", "入库", "出库", "库存", "仓库", "完成", "开户行", "复核",
    "大写", "小写", "人民币", "联系人", "合格", "质量", "第一", "年度", "上午", "下午", "签字", "日期时间", "零一二三四",
    "五六七八九十", "元角分整", "年月日天", "个件本箱", "台张份次",
)  # fmt: skip
HANZI = tuple(sorted(set("".join((*WORDS_ZH, *SURNAMES, *GIVEN)))))

# The 500 characters that come first in Qwen's vocabulary: not read from pages, but known to the vocabulary.
FREQUENT_HANZI = (
    "年数日的月用成名时件一请中据码不新文下分入人功上户为间号取回在页字有个作示出是失表除加败生信类置理本息行定改"
    "市期以修元方录区单位型法县存品前称注值输建能大例度始到面载点密动果图提发式国登错者认误接关重第地如设目开事可"
    "要代小选标明编求列网万最器所内体通务此商序化消否保使次机对量查部性和更后证题确格了于金公午円片空态管主天自我"
    "全今来正说意送容已结会段计源色時交系过电询符未程常条当情口合车实组版周址记二同业权其进试验料传述集多无员报他"
    "無服线这制将处高子道章手库三从支家长付秒路完象则现京转辑限力学外调项北工笑监任相微册联平增听解等得收安价藏命"
    "应看索资产串布原知级水击好物放亿经模之台州配画统共连海节退間比问至备你黑或与影话视读告美女山需复南必闭城近效"
    "利移总按排首記社西先然键额写签因别并异束心链指评整四断角软头邮义司步门导客右频像特非省造径详由包东论络款启而"
    "填释持向算江里份责科民治声男族站没県雅换核素都超店起享拉米引语土宋直每箱後参变基場待规政也介钟五审木打活播该"
    "展钮具志言购但星两左考构報球音端投立们火清账就费案广历及計止么货阳队技场少形稿英游供推税初私景去华話番环张開"
    "种易您再板連真流余见给局优书"
)

KEYS_EN = (
    "Total", "Amount", "Date", "No", "Tax", "Price", "Qty", "Order", "Balance", "Due", "Paid", "Code", "Account", "Phone",
    "Item", "Name", "Fee", "Change", "Net", "Rate", "Invoice No", "Receipt No", "Days", "Type", "Reason", "Department",
    "Start", "End", "Customer", "Method", "Company", "Status",
)  # fmt: skip
FIRST_NAMES = (
    "Alice",
    "Bob",
    "Carol",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Nina",
    "Oscar",
    "Paul",
    "Rose",
    "Sam",
    "Tom",
    "Zoe",
)
LAST_NAMES = ("Smith", "Brown", "Lee", "Wang", "Jones", "Davis", "Clark", "Young", "King", "Hill", "Green", "Baker")
DEPARTMENTS_EN = ("Sales", "Finance", "Research", "Support", "Design", "Legal", "Quality", "Store")
LEAVE_TYPES_EN = ("Annual", "Sick", "Personal", "Unpaid")
ITEMS_EN = (
    "Paper",
    "Coffee",
    "Books",
    "Food",
    "Taxi",
    "Hotel",
    "Service",
    "Shipping",
    "Printer",
    "Phone",
    "Desk",
    "Training",
)
PAY_METHODS_EN = ("Cash", "Card", "Bank", "Check")
COMPANIES_EN = ("Acme", "Globex", "Initech", "Umbra", "Vega", "Orion", "Nova", "Apex")
TITLES_EN = ("Invoice", "Receipt", "Leave Form", "Order", "Bill", "Sales Receipt", "Tax Invoice")
WORDS_EN = (*KEYS_EN, *FIRST_NAMES, *LAST_NAMES, *DEPARTMENTS_EN, *LEAVE_TYPES_EN, *ITEMS_EN, *PAY_METHODS_EN, *COMPANIES_EN, *TITLES_EN, "Address", "Discount", "Subtotal", "Payment", "Page", "Form", "Open", "Unit", "Room", "Yes")  # fmt: skip

DIGITS = "0123456789"
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MARKS = "¥$.,:/-()%#：，。"
CHARACTERS = tuple(DIGITS + LATIN + MARKS) + HANZI
CHARACTER_INDEX = {character: i for i, character in enumerate(CHARACTERS)}


def is_wide(character: str) -> bool:
    """Whether the character is set in the Chinese face of a page: Chinese, and full-width marks."""
    return ord(character) > 0x2E7F
